"""An engine behind a circuit breaker: while its upstream is down, searches fail at once and cost nothing."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Final, TypeVar

from rewarders.breaker import Breaker, State
from rewarders.engines.base import (
    BadQuery,
    EngineThrottled,
    EngineUnavailable,
    SearchEngine,
    SearchRequest,
    SearchResult,
)
from rewarders.engines.permits import Permit, Slot

T = TypeVar("T")
_number: ContextVar[int | None] = ContextVar("number", default=None)  # of the search that this task makes
_STATES: Final[tuple[State, ...]] = ("closed", "half-open", "open")  # by their number in the counters


def guarded(permit: Permit, breaker: Breaker) -> Permit:
    """The permit for an engine that will be behind `breaker`.

    Searches may wait long for a slot. One that was let through before the breaker opened gives its slot back unused.
    """

    @asynccontextmanager
    async def still_wanted() -> AsyncIterator[Slot]:
        async with permit() as slot:
            number = _number.get()
            if number is not None and not breaker.stands(number):
                slot.unused()
                raise EngineUnavailable("left alone: others failed while this search waited for the quota")
            yield slot

    return still_wanted


class GuardedEngine(SearchEngine):
    """Passes everything on to `engine`, and searches only while the breaker lets them.

    It stands below retries and cache, and above the permit: what it stops takes no slot of the quota. What counts:

    * an answer, and `BadQuery`, which is an answer: success;
    * `EngineUnavailable`, and `EngineMisconfigured` (each further request would be refused as well, so hammering on is
      no better than in an outage; its reason is quoted, for who has to mend it): failure;
    * `EngineThrottled`: neither. The upstream works, and the quota makes the whole fleet wait.
    """

    def __init__(self, engine: SearchEngine, breaker: Breaker, clock: Callable[[], float] = time.monotonic) -> None:
        self.engine = engine
        self.breaker = breaker
        self._clock = clock
        self._turned_away = 0
        self._reason = ""

    async def start(self) -> None:
        await self.engine.start()

    async def close(self) -> None:
        await self.engine.close()

    async def check(self) -> None:
        await self.engine.check()

    async def data_version(self) -> str:
        return await self._guard(self.engine.data_version)

    async def search(self, request: SearchRequest) -> SearchResult:
        """As the engine's; `EngineUnavailable` at once, with the time until the next try, while the breaker is open."""
        return await self._guard(lambda: self.engine.search(request))

    def counters(self) -> dict[str, float]:
        return {
            **self.engine.counters(),
            "breaker_state": float(_STATES.index(self.breaker.state)),  # 0 closed, 1 half-open, 2 open
            "breaker_opened": float(self.breaker.opened),
            "breaker_turned_away": float(self._turned_away),
        }

    async def _guard(self, operation: Callable[[], Awaitable[T]]) -> T:
        number = self.breaker.begin(self._clock())
        if number is None:
            self._turned_away += 1
            wait = self.breaker.retry_after_s(self._clock())
            raise EngineUnavailable(f"left alone after failures in a row, the last: {self._reason}", wait)
        token = _number.set(number)
        try:
            result = await operation()
        except BadQuery:
            self.breaker.succeeded(number)
            raise
        except EngineThrottled:
            self.breaker.abandoned(number)
            raise
        except EngineUnavailable as error:
            self._reason = error.reason
            self.breaker.failed(number, self._clock(), error.retry_after_s)
            raise
        except BaseException:
            self.breaker.abandoned(number)
            raise
        finally:
            _number.reset(token)
        self.breaker.succeeded(number)
        return result
