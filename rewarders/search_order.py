"""In which order a rewarder spends the quota: groups begun are finished before others are begun, and the others are
begun in the order of `common.score_order`.

The broker gives slots of the quota to requests in the order in which they were made, so a rewarder asks for a few at a
time only and keeps the others here. A search that two groups share stands where the first to ask for it stood.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Generic, TypeVar

from common.score_order import place_of

T = TypeVar("T")


@dataclass(eq=False)
class Turn:
    """One group's place in the order.

    version, ticket, evaluation: as for `score_order.place_of`. begun: when its first search was let through, in order;
    None: none was yet.
    """

    version: int
    ticket: int
    evaluation: bool = False
    begun: int | None = None

    @property
    def place(self) -> tuple[int, ...]:
        """Smaller goes first."""
        if self.begun is not None:
            return (0, self.begun)
        return (1, *place_of(self.version, self.ticket, self.evaluation))


current_turn: ContextVar[Turn | None] = ContextVar("current_turn", default=None)
"""The group on whose behalf the running task searches; None: nobody's, which goes first."""


class SearchOrder(Generic[T]):
    """Stands before a permit and takes its place: enter `order()` around every request upstream.

    permit: what is entered in turn. ahead: how many may wait for it at once; as many as it can grant at once, so that
    order costs no quota.
    """

    def __init__(self, permit: Callable[[], AbstractAsyncContextManager[T]], ahead: int) -> None:
        if ahead < 1:
            raise ValueError(f"ahead must be at least 1, got {ahead}")
        self._permit = permit
        self._free = ahead
        self._numbers = itertools.count()
        self._waiting: dict[Turn, deque[asyncio.Future[None]]] = {}
        self._nobodys = Turn(version=0, ticket=0, begun=-1)

    @asynccontextmanager
    async def __call__(self) -> AsyncIterator[T]:
        """A grant of the permit, in turn."""
        await self._wait_for_turn()
        passed_on = False
        try:
            async with self._permit() as grant:
                passed_on = True
                self._next()  # this one waits no more
                yield grant
        finally:
            if not passed_on:
                self._next()

    async def _wait_for_turn(self) -> None:
        turn = current_turn.get() or self._nobodys
        if self._free:
            self._free -= 1
            self._begin(turn)
            return
        let_through: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue = self._waiting.setdefault(turn, deque())
        queue.append(let_through)
        try:
            await let_through
        except asyncio.CancelledError:
            if not let_through.cancelled():
                self._next()  # it was let through and does not go
            elif turn in self._waiting and let_through in queue:
                queue.remove(let_through)
                if not queue:
                    del self._waiting[turn]
            raise

    def _next(self) -> None:
        """Let the first in order through, or note that one more may come."""
        while self._waiting:
            turn = min(self._waiting, key=lambda turn: turn.place)
            queue = self._waiting[turn]
            let_through = queue.popleft()
            if not queue:
                del self._waiting[turn]
            if not let_through.done():
                self._begin(turn)
                let_through.set_result(None)
                return
        self._free += 1

    def _begin(self, turn: Turn) -> None:
        if turn.begun is None:
            turn.begun = next(self._numbers)
