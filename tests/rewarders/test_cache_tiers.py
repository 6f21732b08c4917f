"""The order in which a search looks for its answer, and that every way is counted."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from common.tasks import Row
from common.tasks.publication_search import PublicationSearch
from rewarders.answerers.search import SearchAnswerer
from rewarders.cache import CacheStats, SearchCache
from rewarders.cache.disk import DiskResults
from rewarders.cache.found import Refusal, encode_found
from rewarders.cache.key import SearchKey
from rewarders.engines.base import BadQuery, EngineUnavailable, SearchEngine, SearchRequest, SearchResult
from rewarders.retry import Retrier, RetryPolicy

ASKED = SearchRequest("heart", retmax=10)
RESULT = SearchResult(("1", "2"), 2)


class Fleet:
    """Results of other rewarders in a dict."""

    def __init__(self) -> None:
        self.kept: dict[bytes, bytes] = {}
        self.log: list[str] = []

    async def get(self, key: bytes) -> bytes | None:
        self.log.append("get")
        return self.kept.get(key)

    def put(self, key: bytes, payload: bytes) -> None:
        self.log.append("put")
        self.kept[key] = payload

    def failed(self, key: bytes) -> None:
        self.log.append("failed")


class Upstream(SearchEngine):
    """Counts what it is asked; the version of its data and its outage are set from outside."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.version: str | Callable[[], str] = "v1"
        self.failure: Exception | None = None
        self.versions_asked = 0

    async def check(self) -> None:
        pass

    async def data_version(self) -> str:
        self.versions_asked += 1
        await asyncio.sleep(0)
        return self.version if isinstance(self.version, str) else self.version()

    async def search(self, request: SearchRequest) -> SearchResult:
        self.asked[request.term] += 1
        if self.failure is not None:
            raise self.failure
        return RESULT


async def test_memory_then_disk_then_fleet_then_engine(tmp_path: Path) -> None:
    upstream, fleet = Upstream(), Fleet()

    async def process(folder: Path) -> SearchCache:
        cache = SearchCache(source="s", disk=DiskResults(folder), fleet=fleet)
        await cache.start()
        return cache

    one = await process(tmp_path / "host 1")
    assert [await one.search(ASKED, upstream.search) for _ in range(2)] == [RESULT, RESULT]
    assert one.stats == CacheStats(hits=1, misses=1)
    await one.close()
    one = await process(tmp_path / "host 1")
    assert await one.search(ASKED, upstream.search) == RESULT
    assert one.stats == CacheStats(disk=1)
    await one.close()
    assert fleet.log == ["get", "put"], "what the disk has needs no fleet"
    other = await process(tmp_path / "host 2")
    assert await other.search(ASKED, upstream.search) == RESULT
    assert other.stats == CacheStats(shared=1)
    await other.close()
    other = await process(tmp_path / "host 2")
    assert await other.search(ASKED, upstream.search) == RESULT
    assert other.stats == CacheStats(disk=1), "what came from the fleet is kept on disk too"
    await other.close()
    assert upstream.asked == {"heart": 1}


async def test_refusals_are_kept_like_results(tmp_path: Path) -> None:
    upstream, fleet = Upstream(), Fleet()
    upstream.failure = BadQuery("unbalanced")
    for _ in range(2):
        cache = SearchCache(disk=DiskResults(tmp_path), fleet=fleet)
        await cache.start()
        for _ in range(2):
            with pytest.raises(BadQuery, match="unbalanced"):
                await cache.search(ASKED, upstream.search)
        await cache.close()
    assert upstream.asked == {"heart": 1}
    assert list(fleet.kept.values()) == [encode_found(Refusal("unbalanced"))]


async def test_failures_and_cancellations_are_told_to_the_fleet_and_kept_nowhere() -> None:
    upstream, fleet = Upstream(), Fleet()
    cache = SearchCache(fleet=fleet)
    upstream.failure = EngineUnavailable("down")
    with pytest.raises(EngineUnavailable):
        await cache.search(ASKED, upstream.search)
    assert fleet.log == ["get", "failed"]

    async def never(_: SearchRequest) -> SearchResult:
        await asyncio.Event().wait()
        raise AssertionError

    waiting = asyncio.create_task(cache.search(ASKED, never))
    await asyncio.sleep(0.01)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await cache.close()
    assert fleet.log == ["get", "failed"] * 2
    upstream.failure = None
    assert await cache.search(ASKED, upstream.search) == RESULT


async def test_what_another_release_shared_is_fetched_again() -> None:
    upstream, fleet = Upstream(), Fleet()
    fleet.kept[SearchKey("", "", ASKED).digest] = b"\x07 something"
    assert await SearchCache(fleet=fleet).search(ASKED, upstream.search) == RESULT
    assert fleet.log == ["get", "put"]


async def test_new_data_means_new_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewarders.cache.search_cache.VERSION_KNOWN_FOR_S", 0.0)
    upstream = Upstream()
    answerer = SearchAnswerer(PublicationSearch(top_k=10), upstream)
    row = Row("q", "hearts", ("1",))
    for version, asked in (("v1", 1), ("v1", 1), ("v2", 2), ("v2", 2)):
        upstream.version = version
        await answerer.search("heart", row)
        assert upstream.asked == {"heart": asked}
    counted = {"cache_hits": 2.0, "cache_misses": 2.0, "cache_joined": 0.0, "cache_disk": 0.0, "cache_shared": 0.0}
    assert answerer.counters().items() >= counted.items()


async def test_many_searches_ask_for_the_version_once() -> None:
    upstream = Upstream()
    answerer = SearchAnswerer(PublicationSearch(top_k=10), upstream)
    await asyncio.gather(*(answerer.search(f"heart {number}", Row("q", "hearts", ("1",))) for number in range(50)))
    assert upstream.versions_asked == 1


async def test_data_of_unknown_version_is_an_outage() -> None:
    def down() -> str:
        raise EngineUnavailable("no version")

    upstream = Upstream()
    upstream.version = down
    retrier = Retrier(RetryPolicy(attempts=2, base_s=0.0))
    answerer = SearchAnswerer(PublicationSearch(top_k=10), upstream, retrier=retrier)
    with pytest.raises(EngineUnavailable, match="no version"):
        await answerer.search("heart", Row("q", "hearts", ("1",)))
    assert (upstream.versions_asked, upstream.asked) == (2, {})
