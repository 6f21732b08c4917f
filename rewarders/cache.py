"""Search results in memory: least recently used out first, identical searches in flight are one request.

GRPO samples of one prompt often write the same query, so sharing answers is the largest saving of quota
there is. Failures are never stored: the next one to ask asks the engine again.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable

import msgspec

from rewarders.engines.base import EngineUnavailable, SearchRequest, SearchResult

Fetch = Callable[[SearchRequest], Awaitable[SearchResult]]


class CacheStats(msgspec.Struct):
    """hits: answered from memory. joined: answered by a request already in flight. misses: asked the
    engine.
    """

    hits: int = 0
    joined: int = 0
    misses: int = 0


class _Flight:
    """One request in flight and how many wait for it."""

    def __init__(self, task: asyncio.Task[SearchResult]) -> None:
        self.task = task
        self.waiters = 0


class SearchCache:
    """LRU cache with single flight, for one event loop.

    max_entries: results kept. max_ids: ids kept over all results, because one result may hold 9,999 (some
    65 bytes each); 0 entries means no storing, single flight only.
    """

    def __init__(self, max_entries: int = 100_000, max_ids: int = 5_000_000) -> None:
        if max_entries < 0 or max_ids < 0:
            raise ValueError("cache sizes must not be negative")
        self._max_entries = max_entries
        self._max_ids = max_ids
        self._results: OrderedDict[SearchRequest, SearchResult] = OrderedDict()
        self._flights: dict[SearchRequest, _Flight] = {}
        self._ids = 0
        self.stats = CacheStats()

    def __len__(self) -> int:
        return len(self._results)

    async def search(self, request: SearchRequest, fetch: Fetch) -> SearchResult:
        """Return the result of `request`, from memory, from a flight under way, or by `await
        fetch(request)`.

        Raises what fetch raises, to everyone who waits for it. Cancelling one waiter leaves the others
        their answer; when the last one goes, the request is cancelled too, so that it stops waiting for
        quota.
        """
        result = self._results.get(request)
        if result is not None:
            self._results.move_to_end(request)
            self.stats.hits += 1
            return result
        flight = self._flights.get(request)
        if flight is None:
            self.stats.misses += 1
            flight = self._take_off(request, fetch)
        else:
            self.stats.joined += 1
        return await self._await_landing(request, flight)

    async def close(self) -> None:
        """Cancel what is in flight (its waiters get EngineUnavailable) and wait until it is gone."""
        tasks = [flight.task for flight in self._flights.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _take_off(self, request: SearchRequest, fetch: Fetch) -> _Flight:
        flight = _Flight(asyncio.ensure_future(self._fly(request, fetch)))
        self._flights[request] = flight
        flight.task.add_done_callback(lambda task: self._land(request, flight, task))
        return flight

    async def _fly(self, request: SearchRequest, fetch: Fetch) -> SearchResult:
        return await fetch(request)

    def _land(self, request: SearchRequest, flight: _Flight, task: asyncio.Task[SearchResult]) -> None:
        if self._flights.get(request) is flight:
            del self._flights[request]
        if task.cancelled() or task.exception() is not None:
            return
        self._store(request, task.result())

    async def _await_landing(self, request: SearchRequest, flight: _Flight) -> SearchResult:
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
                if self._flights.get(request) is flight:
                    del self._flights[request]
                flight.task.cancel()

    def _store(self, request: SearchRequest, result: SearchResult) -> None:
        replaced = self._results.pop(request, None)
        self._ids += len(result.ids) - (len(replaced.ids) if replaced else 0)
        self._results[request] = result
        while self._results and (len(self._results) > self._max_entries or self._ids > self._max_ids):
            _, evicted = self._results.popitem(last=False)
            self._ids -= len(evicted.ids)
