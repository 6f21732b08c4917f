"""The blocking face of `AsyncRewriter`, for scripts and notebooks."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from deploy.model_choice import rewriting_config
from deploy.models import resolve_model
from deploy.rewriting.results import Found, Rewrite
from deploy.rewriting.rewriter import DEFAULT_TOP, AsyncRewriter

T = TypeVar("T")


class Rewriter:
    """A model that rewrites requests; use it as a context manager, or call `close` after the last request.

    >>> with Rewriter("runs/demo") as rewriter:
    ...     rewrite = rewriter.rewrite("Does aspirin prevent strokes in older adults?", top=5)
    ...     print(rewrite.query, [hit.title for hit in rewrite.found.hits])

    May be used from several threads: their requests share the model's batch. Not inside of a running event loop, where
    `AsyncRewriter` is at home.

    Args:
        model: a run's folder (`runs/demo@50`: of step 50), a Hugging Face folder, an id of the hub, or `openai:MODEL`.
        config: a config file whose task and engine are used; default: those of the run, if the model is one.
        overrides: dotted, as on the command line: `["task.name=trial_search"]`.
        base_url, api_key_file: of an endpoint.
        search: False: no engine is started, and nothing can be searched.

    Raises:
        LaunchError, ConfigError, EngineError, EngineUnavailable: it cannot start; one line that says what to do.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        config: str | Path | None = None,
        overrides: Sequence[str] = (),
        base_url: str | None = None,
        api_key_file: str | None = None,
        search: bool = True,
    ) -> None:
        source = resolve_model(str(model), base_url, api_key_file)
        settled = rewriting_config(str(model), None if config is None else Path(config), overrides, corpus=search)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rewriter", daemon=True)
        self._thread.start()
        self._rewriter: AsyncRewriter | None = None
        try:
            rewriter = self._wait(_made(source, settled, search))
            self._rewriter = self._wait(rewriter.__aenter__())
        except BaseException:
            self.close()
            raise

    def rewrite(self, request: str, *, task: str = "", top: int = 0, database: str = "", **wish: Any) -> Rewrite:
        """The query for one request.

        Args:
            task: its name; "": that of the config.
            top: results to fetch for the query; 0: none.
            database: of a request for SQL.
            wish: fields of `Wish`: `temperature`, `max_tokens`, `seed`, …

        Raises:
            NotPossible: it cannot be rewritten like that. GenerationRefused: it is too long.
        """
        return self.rewrite_all([request], task=task, top=top, database=database, **wish)[0]

    def rewrite_all(
        self, requests: Iterable[str], *, task: str = "", top: int = 0, database: str = "", **wish: Any
    ) -> list[Rewrite]:
        """The queries for many requests, in their order, generated in one batch. Arguments as for `rewrite`."""
        return self._wait(self._rewrite_all(self._running, list(requests), task, top, database, wish))

    def search(self, query: str, *, task: str = "", top: int = DEFAULT_TOP, database: str = "") -> Found:
        """What a query brings.

        Raises:
            NotPossible: the task has no engine here. EngineUnavailable: it could not be asked.
        """
        rewriter = self._running
        return self._wait(rewriter.search(query, rewriter.row(query, task, database), task, top))

    def close(self) -> None:
        """End the model and the engines. May be called twice."""
        rewriter, self._rewriter = self._rewriter, None
        if rewriter is not None:
            self._wait(rewriter.__aexit__(None, None, None))
        if self._loop.is_running():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _running(self) -> AsyncRewriter:
        if self._rewriter is None:
            raise RuntimeError("this rewriter is closed")
        return self._rewriter

    async def _rewrite_all(
        self,
        rewriter: AsyncRewriter,
        requests: Sequence[str],
        task: str,
        top: int,
        database: str,
        wish: dict[str, Any],
    ) -> list[Rewrite]:
        one = replace(rewriter.default_wish, **{**wish, "n": 1})
        rows = [rewriter.row(request, task, database) for request in requests]
        rewrites = await asyncio.gather(*(rewriter.rewrite(row, task, one, top) for row in rows))
        return [first for first, *_ in rewrites]

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


async def _made(source: Any, config: Any, search: bool) -> AsyncRewriter:
    """Made inside of the loop that it will run in."""
    return AsyncRewriter(source, [config], search)
