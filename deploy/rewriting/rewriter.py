"""One model behind one interface: every task, and the engines that the configs name."""

from __future__ import annotations

import asyncio
import itertools
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from common.config import Config
from common.data.beir import DataError
from common.tasks import Row, Task, load_task, task_names
from common.tasks.from_config import task_of
from deploy.generation import GenerationRefused, Generator, generator_of
from deploy.models import ModelSource
from deploy.rewriting.results import Found, Rewrite
from deploy.rewriting.task_rewriter import TaskRewriter, Wish

if TYPE_CHECKING:
    from actors.engine import TextListener
    from deploy.rewriting.searcher import Searcher

DEFAULT_TOP: Final = 10


class NotPossible(ValueError):  # noqa: N818 (the name of the verdict)
    """What was asked for makes no sense here; one line that says what does."""


class AsyncRewriter(AbstractAsyncContextManager["AsyncRewriter"]):
    """Rewrites and searches for any number of callers at a time; to be used as an async context manager.

    The tasks of the configs are known by their names, the first is the default. Our other tasks can be rewritten for
    too, in the prompt form of the first, but there is no engine to search for them.

    Args:
        model: what rewrites.
        configs: each has a task and the engine it is searched with; `data.corpus` is a folder. Of the first also how
            the model runs (`actor`).
        search: False: no engine is started, and nothing can be searched.
        statistics: see `EngineOptions`.
    """

    def __init__(
        self, model: ModelSource, configs: Sequence[Config], search: bool = True, statistics: bool = False
    ) -> None:
        if not configs:
            raise ValueError("a rewriter needs a config")
        self.model = model
        self.configs: Mapping[str, Config] = {config.task.name: config for config in configs}
        if len(self.configs) < len(configs):
            raise NotPossible("two configs have the same task: a task is known by its name")
        self._first = configs[0]
        self._search = search
        self._tasks: dict[str, Task] = {name: task_of(config) for name, config in self.configs.items()}
        self._searchers: dict[str, Searcher] = {}
        self._generator: Generator = generator_of(model, self._first, statistics=statistics)
        self._numbers = itertools.count()
        self._open = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Start engines and model.

        Raises:
            LaunchError, EngineError, EngineUnavailable: one of them does not start; one line that says what to do.
        """
        try:
            # The model first: a forked engine must not inherit the sockets of the others.
            await self._open.enter_async_context(self._generator)
            if self._search:
                await self._start_searchers()
        except BaseException:
            await self._open.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._open.aclose()

    @property
    def generator(self) -> Generator:
        """What generates."""
        return self._generator

    @property
    def default_task(self) -> str:
        """The task of requests that name none."""
        return next(iter(self.configs))

    @property
    def default_wish(self) -> Wish:
        """How requests are rewritten that do not say how: greedily, as long as the first config's samples."""
        return Wish(max_tokens=self._first.sampling.max_tokens)

    def task_names(self) -> list[str]:
        """Tasks that can be rewritten for, those of the configs first."""
        return list(dict.fromkeys([*self.configs, *task_names()]))

    def can_search(self, task: str) -> bool:
        """Whether an engine is started for a task."""
        return task in self._searchers

    def task(self, name: str = "") -> Task:
        """A task by its name; "": the default.

        Raises:
            NotPossible: there is no such task.
        """
        name = name or self.default_task
        if name not in self._tasks:
            if name not in task_names():  # not a user's own `module:Class` either: whoever asks may be a stranger
                raise NotPossible(f"there is no task {name!r} here, only {', '.join(self.task_names())}")
            form = self._first.task
            self._tasks[name] = load_task(name, prompt=form.prompt, reasoning=form.reasoning, strict=form.strict)
        return self._tasks[name]

    def require(self, task: str, wish: Wish, top: int) -> None:
        """Raises NotPossible where `rewrite` would, whatever the request."""
        self.task(task)
        if top:
            self._searcher(task or self.default_task)
        if wish.n > 1 and wish.temperature == 0:
            raise NotPossible("greedy rewrites are all the same: ask for one, or for a temperature above 0")

    def row(
        self, text: str, task: str = "", database: str = "", knowledge: str = "", max_date: str | None = None
    ) -> Row:
        """A request as the tasks know it. database: of a request for SQL; its schema is read from the file.

        Raises:
            NotPossible: the request is empty, or the database is not there.
        """
        if not text.strip():
            raise NotPossible("the request is empty")
        tables = self._schema(task or self.default_task, database) if "database" in self.task(task).needs else ""
        return Row(
            str(next(self._numbers)), text, database=database, tables=tables, knowledge=knowledge, max_date=max_date
        )

    async def rewrite(
        self, row: Row, task: str = "", wish: Wish | None = None, top: int = 0, listener: TextListener | None = None
    ) -> list[Rewrite]:
        """`wish.n` rewrites of a request.

        Args:
            top: results of each query; 0: it is not searched.
            listener: told how the texts grow (`TaskRewriter.rewrite`).

        Raises:
            NotPossible: the request cannot be rewritten or searched like that. GenerationRefused: the model cannot
                answer it. EngineUnavailable, EngineError: the model cannot be asked.
        """
        name, wish = task or self.default_task, wish or self.default_wish
        self.require(name, wish, top)
        rewrites = await TaskRewriter(self.task(name), self._generator).rewrite(row, wish, listener)
        if not top:
            return rewrites
        return list(await asyncio.gather(*(self._with_results(each, row, name, top) for each in rewrites)))

    async def attempt(
        self, row: Row, task: str = "", wish: Wish | None = None, top: int = 0, listener: TextListener | None = None
    ) -> list[Rewrite]:
        """As `rewrite`, for one of many requests: what the model cannot answer is one invalid rewrite."""
        try:
            return await self.rewrite(row, task, wish, top, listener)
        except GenerationRefused as error:
            name = task or self.default_task
            return [Rewrite(request=row.text, task=name, query="", invalid=error.reason)]

    async def search(self, query: str, row: Row, task: str = "", top: int = DEFAULT_TOP) -> Found:
        """What a query brings for a request.

        Raises:
            NotPossible: the task has no engine here, or the query cannot be searched. EngineUnavailable: the engine
                could not be asked, after the retries.
        """
        if not query.strip():
            raise NotPossible("the query is empty")
        try:
            return await self._searcher(task or self.default_task).search(query, row, top)
        except ValueError as error:
            raise NotPossible(str(error)) from None

    async def _start_searchers(self) -> None:
        from deploy.rewriting.searcher import searcher_of

        folder = Path(self._open.enter_context(tempfile.TemporaryDirectory(prefix="deepretrieval-")))
        for name, config in self.configs.items():
            started = searcher_of(config, self._tasks[name], folder)
            self._searchers[name] = await self._open.enter_async_context(started)

    async def _with_results(self, rewrite: Rewrite, row: Row, task: str, top: int) -> Rewrite:
        from rewarders.engines.base import EngineUnavailable

        if rewrite.invalid:
            return rewrite
        try:
            found = await self.search(rewrite.query, row, task, top)
        except EngineUnavailable as error:
            return rewrite.model_copy(update={"unavailable": error.reason})
        return rewrite.model_copy(update={"found": found})

    def _searcher(self, task: str) -> Searcher:
        searcher = self._searchers.get(task)
        if searcher is None:
            having = ", ".join(self._searchers) or "none: searching is off"
            raise NotPossible(f"no engine is started for the task {task}; tasks with one: {having}")
        return searcher

    def _schema(self, task: str, database: str) -> str:
        from common.data.originals.sql_sets import databases_below, schema_of

        config = self.configs.get(task)
        folder = Path((config or self._first).data.corpus)
        known = databases_below(folder) if folder.is_dir() else {}
        if database not in known:
            names = ", ".join(sorted(known)[:10]) or f"none below {folder}"
            raise NotPossible(f"the task {task} needs the name of a database, not {database!r}; there are: {names}")
        try:
            return schema_of(known[database])
        except DataError as error:
            raise NotPossible(str(error)) from None
