"""What one process remembers: results, least recently used out first, and searches in flight.

GRPO samples of one prompt often write the same query, so sharing answers is the largest saving of quota there is.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

from rewarders.cache.found import Found, Refusal
from rewarders.cache.key import SearchKey
from rewarders.engines.base import EngineUnavailable

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class ResultMemory:
    """At most `max_entries` results, and over all of them at most `max_ids` ids, because one result may hold 9,999
    (some 65 bytes each)."""

    def __init__(self, max_entries: int, max_ids: int) -> None:
        if max_entries < 0 or max_ids < 0:
            raise ValueError("cache sizes must not be negative")
        self._max_entries = max_entries
        self._max_ids = max_ids
        self._kept: OrderedDict[SearchKey, Found] = OrderedDict()
        self._ids = 0

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: SearchKey) -> Found | None:
        """What is kept under `key`, which is now the most recently used."""
        found = self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
        return found

    def put(self, key: SearchKey, found: Found) -> None:
        """Keep a result, in the place of the least recently used ones."""
        replaced = self._kept.pop(key, None)
        self._ids += _size(found) - (0 if replaced is None else _size(replaced))
        self._kept[key] = found
        while self._kept and (len(self._kept) > self._max_entries or self._ids > self._max_ids):
            _, evicted = self._kept.popitem(last=False)
            self._ids -= _size(evicted)


def _size(found: Found) -> int:
    if isinstance(found, Refusal):
        return 0
    characters = sum(map(len, (*(found.texts or ()), *(found.titles or ()))))
    return len(found.ids) + characters // 65  # an id takes some 65 bytes


class _Flight(Generic[T]):
    """One request in flight and how many wait for it."""

    def __init__(self, task: asyncio.Task[T]) -> None:
        self.task = task
        self.waiters = 0


class Flights(Generic[K, T]):
    """Single flight: who asks for what is being fetched waits for the same answer. For one event loop."""

    def __init__(self) -> None:
        self._flights: dict[K, _Flight[T]] = {}

    def __contains__(self, key: K) -> bool:
        return key in self._flights

    async def join(self, key: K, fetch: Callable[[], Awaitable[T]]) -> T:
        """The answer of the flight under way, or of one that begins with `fetch()`.

        Raises what fetch raises, to everyone who waits for it. Cancelling one waiter leaves the others their answer;
        when the last one goes, the request is cancelled too, so that it stops waiting for quota.
        """
        flight = self._flights.get(key) or self._take_off(key, fetch)
        flight.waiters += 1
        try:
            return await asyncio.shield(flight.task)
        except asyncio.CancelledError:
            waiter = asyncio.current_task()
            if flight.task.cancelled() and not (waiter and waiter.cancelling()):
                raise EngineUnavailable("the search was given up at shutdown") from None
            raise
        finally:
            flight.waiters -= 1
            if flight.waiters == 0 and not flight.task.done():
                # Taken out at once: whoever asks next must not join a request that is being cancelled.
                self._remove(key, flight)
                flight.task.cancel()

    async def close(self) -> None:
        """Cancel what is in flight (its waiters get EngineUnavailable) and wait until it is gone."""
        tasks = [flight.task for flight in self._flights.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _take_off(self, key: K, fetch: Callable[[], Awaitable[T]]) -> _Flight[T]:
        async def fly() -> T:
            return await fetch()

        flight = self._flights[key] = _Flight(asyncio.create_task(fly()))
        flight.task.add_done_callback(lambda task: self._land(key, flight, task))
        return flight

    def _land(self, key: K, flight: _Flight[T], task: asyncio.Task[T]) -> None:
        self._remove(key, flight)
        if not task.cancelled():
            task.exception()  # looked at, so that asyncio does not report one nobody waited for

    def _remove(self, key: K, flight: _Flight[T]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
