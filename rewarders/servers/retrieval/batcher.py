"""Queries that arrive while the index is busy are its next batch: nobody waits for a batch to fill up."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Iterable

from rewarders.engines.base import EngineUnavailable
from rewarders.servers.retrieval.backend import Backend, Query, Ranking, Refusal

logger = logging.getLogger(__name__)

Outcome = Ranking | Refusal | EngineUnavailable
_Entry = tuple[Query, asyncio.Future[Outcome]]


class Batcher:
    """Gives a backend one batch after the other. Use it between `start` and `close`."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._waiting: deque[_Entry] = deque()
        self._arrived = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.batches = 0

    def start(self) -> None:
        """Begin to search."""
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Stop; whoever waits gets EngineUnavailable."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._fail(self._waiting, EngineUnavailable("the server is stopping"))
        self._waiting.clear()

    async def search(self, queries: list[Query]) -> list[Outcome]:
        """The outcome of each query, in order."""
        if self._task is None:
            return [EngineUnavailable("the server is stopping")] * len(queries)
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[Outcome]] = [loop.create_future() for _ in queries]
        self._waiting.extend(zip(queries, futures, strict=True))
        self._arrived.set()
        return await asyncio.gather(*futures)

    async def _run(self) -> None:
        while True:
            await self._arrived.wait()
            batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._backend.batch))]
            if not self._waiting:
                self._arrived.clear()
            # Whoever has gone away since takes no time from the others.
            batch = [(query, future) for query, future in batch if not future.done()]
            if batch:
                await self._answer(batch)

    async def _answer(self, batch: list[_Entry]) -> None:
        self.batches += 1
        try:
            answers = await self._backend.search([query for query, _ in batch])
        except asyncio.CancelledError:
            self._fail(batch, EngineUnavailable("the server is stopping"))
            raise
        except EngineUnavailable as error:
            self._fail(batch, error)
        except Exception as error:  # a fault in here must not leave everybody waiting for ever
            logger.exception("a batch of %d queries failed", len(batch))
            self._fail(batch, EngineUnavailable(f"the index failed: {type(error).__name__}"))
        else:
            for (_, future), answer in zip(batch, answers, strict=True):
                if not future.done():
                    future.set_result(answer)

    @staticmethod
    def _fail(entries: Iterable[_Entry], error: EngineUnavailable) -> None:
        for _, future in entries:
            if not future.done():
                future.set_result(error)
