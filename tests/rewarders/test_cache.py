from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from rewarders.cache import CacheStats, SearchCache
from rewarders.engines.base import EngineUnavailable, SearchRequest, SearchResult


def request(term: str) -> SearchRequest:
    return SearchRequest(term, retmax=100)


class Upstream:
    """A fetch function that waits at a gate and counts what it is asked."""

    def __init__(self, ids: int = 1) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.asked: Counter[str] = Counter()
        self.cancelled: Counter[str] = Counter()
        self.fail: Exception | None = None
        self.ids = ids

    async def __call__(self, wanted: SearchRequest) -> SearchResult:
        self.asked[wanted.term] += 1
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled[wanted.term] += 1
            raise
        if self.fail is not None:
            raise self.fail
        return SearchResult(ids=tuple(f"{wanted.term}{n}" for n in range(self.ids)), count=self.ids)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_second_search_is_answered_from_memory() -> None:
    upstream, cache = Upstream(), SearchCache()
    first = await cache.search(request("a"), upstream)
    assert await cache.search(request(" a "), upstream) == first
    await cache.search(SearchRequest("a", retmax=5), upstream)
    await cache.search(SearchRequest("a", retmax=100, max_date="2020"), upstream)
    assert upstream.asked == {"a": 3}
    assert cache.stats == CacheStats(hits=1, joined=0, misses=3)


async def test_identical_searches_in_flight_are_one_request() -> None:
    upstream, cache = Upstream(), SearchCache()
    upstream.gate.clear()
    searches = [asyncio.ensure_future(cache.search(request("a"), upstream)) for _ in range(10)]
    other = asyncio.ensure_future(cache.search(request("b"), upstream))
    await settle()
    upstream.gate.set()
    results = await asyncio.gather(*searches)
    assert (await other).ids == ("b0",)
    assert {result.ids for result in results} == {("a0",)}
    assert upstream.asked == {"a": 1, "b": 1}
    assert cache.stats == CacheStats(hits=0, joined=9, misses=2)


async def test_failures_reach_every_waiter_and_are_not_kept() -> None:
    upstream, cache = Upstream(), SearchCache()
    upstream.fail = EngineUnavailable("down")
    outcomes = await asyncio.gather(*(cache.search(request("a"), upstream) for _ in range(3)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [EngineUnavailable] * 3
    assert upstream.asked == {"a": 1}
    assert len(cache) == 0
    upstream.fail = None
    assert (await cache.search(request("a"), upstream)).count == 1
    assert upstream.asked == {"a": 2}


async def test_a_cancelled_waiter_leaves_the_others_their_answer() -> None:
    upstream, cache = Upstream(), SearchCache()
    upstream.gate.clear()
    first, second = (asyncio.ensure_future(cache.search(request("a"), upstream)) for _ in range(2))
    await settle()
    first.cancel()
    await settle()
    upstream.gate.set()
    assert (await second).ids == ("a0",)
    assert first.cancelled()
    assert upstream.asked == {"a": 1}
    assert not upstream.cancelled


async def test_the_last_waiter_to_go_takes_the_request_with_it() -> None:
    upstream, cache = Upstream(), SearchCache()
    upstream.gate.clear()
    waiters = [asyncio.ensure_future(cache.search(request("a"), upstream)) for _ in range(2)]
    await settle()
    for waiter in waiters:
        waiter.cancel()
    await settle()
    assert upstream.cancelled == {"a": 1}
    upstream.gate.set()
    assert (await cache.search(request("a"), upstream)).ids == ("a0",)
    assert upstream.asked == {"a": 2}


async def test_a_search_that_starts_while_the_old_one_is_cancelled_gets_its_own_request() -> None:
    upstream, cache = Upstream(), SearchCache()
    upstream.gate.clear()
    waiter = asyncio.ensure_future(cache.search(request("a"), upstream))
    await settle()
    waiter.cancel()
    newcomer = asyncio.ensure_future(cache.search(request("a"), upstream))
    await settle()
    upstream.gate.set()
    assert (await newcomer).ids == ("a0",)


async def test_close_gives_waiters_unavailable_not_a_cancellation() -> None:
    upstream, cache = Upstream(), SearchCache()
    upstream.gate.clear()
    waiter = asyncio.ensure_future(cache.search(request("a"), upstream))
    await settle()
    await cache.close()
    with pytest.raises(EngineUnavailable, match="shutdown"):
        await waiter
    assert upstream.cancelled == {"a": 1}


async def test_least_recently_used_goes_first() -> None:
    upstream, cache = Upstream(), SearchCache(max_entries=2)
    for term in ("a", "b", "a", "c", "a", "b"):
        await cache.search(request(term), upstream)
    assert upstream.asked == {"a": 1, "b": 2, "c": 1}
    assert len(cache) == 2


async def test_memory_is_bounded_by_ids_as_well() -> None:
    upstream, cache = Upstream(ids=40), SearchCache(max_entries=100, max_ids=100)
    for term in ("a", "b", "c", "c"):
        await cache.search(request(term), upstream)
    assert len(cache) == 2
    assert upstream.asked == {"a": 1, "b": 1, "c": 1}
    upstream.ids = 101
    await cache.search(request("huge"), upstream)
    assert len(cache) == 0
    upstream.ids = 40
    await cache.search(request("d"), upstream)
    await cache.search(request("d"), upstream)
    assert upstream.asked["d"] == 1


async def test_without_entries_only_flights_are_shared() -> None:
    upstream, cache = Upstream(), SearchCache(max_entries=0)
    await asyncio.gather(*(cache.search(request("a"), upstream) for _ in range(3)))
    await cache.search(request("a"), upstream)
    assert upstream.asked == {"a": 2}


def test_negative_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        SearchCache(max_entries=-1)
