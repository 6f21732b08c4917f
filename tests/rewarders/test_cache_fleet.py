"""Several rewarders on a real broker: what they all ask is one request upstream, also where requests fail."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from common.broker.service import BrokerSettings
from common.transport.client import BrokerClient
from common.transport.keys import create_run_keys
from rewarders.cache import SearchCache
from rewarders.engines.base import BadQuery, EngineUnavailable, SearchRequest, SearchResult
from tests.common.broker_world import RunningBroker, peer

REWARDERS, QUERIES = 4, 25


class Upstream:
    """Notes how many requests for one query are out at once; fails as often as it is told."""

    def __init__(self, failure_rate: float = 0.0) -> None:
        self.asked: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.out: Counter[str] = Counter()
        self.most_out = 0
        self._failure_rate = failure_rate
        self._random = random.Random(7)

    async def __call__(self, request: SearchRequest) -> SearchResult:
        term = request.term
        self.asked[term] += 1
        self.out[term] += 1
        self.most_out = max(self.most_out, self.out[term])
        try:
            await asyncio.sleep(self._random.random() * 0.02)
            if self._random.random() < self._failure_rate:
                self.failed[term] += 1
                raise EngineUnavailable("HTTP 503")
            if term.endswith("7"):
                raise BadQuery("sevens are refused")
            return SearchResult((term,), 1)
        finally:
            self.out[term] -= 1


@pytest.fixture
async def clients(tmp_path: Path) -> AsyncIterator[list[BrokerClient]]:
    create_run_keys(tmp_path / "keys")
    broker = RunningBroker(tmp_path / "keys", BrokerSettings(epoch=1, heartbeat_s=0.1))
    async with AsyncExitStack() as stack:
        peers = [peer(broker.endpoint, tmp_path / "keys", "rewarder", f"r{number}") for number in range(REWARDERS)]
        yield [await stack.enter_async_context(one) for one in peers]
    await asyncio.to_thread(broker.stop)


async def ask_all(caches: list[SearchCache], upstream: Upstream) -> list[list[object]]:
    """Every rewarder asks every query twice at once, each in an order of its own."""

    async def ask(cache: SearchCache, seed: int) -> list[object]:
        terms = [f"q{number}" for number in range(QUERIES)] * 2
        order = random.Random(seed).sample(terms, len(terms))
        searches = (cache.search(SearchRequest(term, 10), upstream) for term in order)
        found = dict(zip(order, await asyncio.gather(*searches, return_exceptions=True), strict=True))
        return [found[f"q{number}"] for number in range(QUERIES)]

    return await asyncio.gather(*(ask(cache, seed) for seed, cache in enumerate(caches)))


async def test_what_all_ask_is_one_request_upstream(clients: list[BrokerClient]) -> None:
    upstream = Upstream()
    caches = [SearchCache(fleet=client.shared) for client in clients]
    answers = await ask_all(caches, upstream)
    assert upstream.asked == {f"q{number}": 1 for number in range(QUERIES)}
    for number in range(QUERIES):
        expected = "BadQuery('sevens are refused')" if number % 10 == 7 else repr(SearchResult((f"q{number}",), 1))
        assert {repr(mine[number]) for mine in answers} == {expected}
    assert sum(cache.stats.misses for cache in caches) == QUERIES
    assert sum(cache.stats.shared for cache in caches) == QUERIES * (REWARDERS - 1)


async def test_failures_are_retried_by_one_at_a_time_and_shared_by_nobody(clients: list[BrokerClient]) -> None:
    upstream = Upstream(failure_rate=0.5)
    caches = [SearchCache(fleet=client.shared) for client in clients]
    for _ in range(40):
        answers = await ask_all(caches, upstream)
        if not any(isinstance(answer, EngineUnavailable) for mine in answers for answer in mine):
            break
    else:
        raise AssertionError("never all answered")
    assert upstream.most_out == 1, "one live fetcher per key"
    assert sum(upstream.failed.values()) > 0
    assert upstream.asked == upstream.failed + Counter({f"q{number}": 1 for number in range(QUERIES)})


async def test_a_rewarder_that_leaves_while_it_fetches_holds_nobody_up(clients: list[BrokerClient]) -> None:
    leaving, staying = (SearchCache(fleet=client.shared) for client in clients[:2])
    begun = asyncio.Event()

    async def never(_: SearchRequest) -> SearchResult:
        begun.set()
        await asyncio.Event().wait()
        raise AssertionError

    fetching = asyncio.create_task(leaving.search(SearchRequest("q", 10), never))
    await begun.wait()
    upstream = Upstream()
    waiting = asyncio.create_task(staying.search(SearchRequest("q", 10), upstream))
    await asyncio.sleep(0.1)
    assert not upstream.asked
    await leaving.close()
    async with asyncio.timeout(30):
        assert (await waiting).ids == ("q",)
    await asyncio.gather(fetching, return_exceptions=True)
