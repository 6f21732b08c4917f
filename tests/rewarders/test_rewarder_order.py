"""A rewarder whose quota is short: which of its groups are searched for, on a real broker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from common import messages as m
from common.broker.service import BrokerSettings
from common.tasks.publication_search import PublicationSearch
from common.transport.client import BrokerClient
from common.transport.keys import create_run_keys
from rewarders.engines.base import SearchEngine, SearchRequest, SearchResult
from rewarders.loop import Rewarder
from rewarders.search_order import SearchOrder
from tests.common.broker_world import RunningBroker, next_assignment, peer, ticket
from tests.rewarders.search_scorer import search_scorer

PATIENCE_S = 30.0


class Gate:
    """A quota that lets nobody through until it is opened."""

    def __init__(self) -> None:
        self.opened = asyncio.Event()

    @asynccontextmanager
    async def permit(self) -> AsyncIterator[None]:
        await self.opened.wait()
        yield


class Upstream(SearchEngine):
    """Notes in which order queries get through."""

    def __init__(self, gate: Gate) -> None:
        self.order = SearchOrder(gate.permit, ahead=1)
        self.asking: set[str] = set()
        self.sent: list[str] = []

    async def check(self) -> None:
        pass

    async def search(self, request: SearchRequest) -> SearchResult:
        self.asking.add(request.term)
        try:
            async with self.order():
                self.sent.append(request.term)
                return SearchResult(("1",), 1)
        finally:
            self.asking.discard(request.term)


def rollout(number: int, version: int, *queries: str) -> m.Rollout:
    texts = [f'<think></think><answer>{{"query": "{query}"}}</answer>' for query in queries]
    samples = tuple(m.SampleHeader(text, 1, "stop", (m.WeightSpan(version, 0, 1),)) for text in texts)
    ones = np.ones(len(texts), np.int32)
    return m.Rollout(m.RolloutHeader(number, "actor-1", 1, samples), ones[:1], ones, ones.astype(np.float32))


class Fleet:
    """Learner, actor and a rewarder that has taken three groups of versions 3, 7 and 5."""

    def __init__(self, broker: RunningBroker, keys_dir: Path) -> None:
        self.broker = broker
        self.keys_dir = keys_dir
        self.gate = Gate()
        self.upstream = Upstream(self.gate)
        self.stack = AsyncExitStack()

    async def join(self, role: m.Role, name: str = "", incarnation: int = 0) -> BrokerClient:
        context = peer(self.broker.endpoint, self.keys_dir, role, name, incarnation=incarnation)
        return await self.stack.enter_async_context(context)

    async def take(self) -> BrokerClient:
        """Returns the learner."""
        learner, actor = await self.join("learner", incarnation=1), await self.join("actor")
        rewarder = await self.join("rewarder")
        scorer = search_scorer(PublicationSearch(top_k=10), self.upstream)
        loop = asyncio.create_task(Rewarder(rewarder, scorer, concurrent_groups=8).run())
        self.stack.callback(loop.cancel)
        actor.serve("rollout", 3)
        learner.serve("train", 8)
        learner.submit([_with_reference(ticket(number)) for number in (1, 2, 3)])
        queries: set[str] = set()
        for version in (3, 7, 5):
            work = await next_assignment(actor)
            mine = [f"v{version} first", f"v{version} second"]
            actor.complete(work, m.encode_rollout(rollout(work.lease.item, version, *mine)))
            queries |= set(mine)
            await self.until(queries)
        return learner

    async def until(self, asking: set[str]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while self.upstream.asking != asking:
                await asyncio.sleep(0.01)


def _with_reference(one: m.Ticket) -> m.Ticket:
    reference = {"id": "q", "text": "hearts", "relevant": ["1"], "max_date": None}
    return m.Ticket(one.ticket_id, one.kind, one.prompt_id, 0, one.messages, reference, one.sampling, one.min_version)


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    create_run_keys(tmp_path / "keys")
    broker = RunningBroker(tmp_path / "keys", BrokerSettings(epoch=1, heartbeat_s=0.1))
    fleet = Fleet(broker, tmp_path / "keys")
    async with fleet.stack:
        yield fleet
    await asyncio.to_thread(broker.stop)


async def test_the_group_begun_is_finished_then_those_that_expire_first_are(fleet: Fleet) -> None:
    learner = await fleet.take()
    fleet.gate.opened.set()
    done = [m.decode_scored_group((await next_assignment(learner)).payload) for _ in range(3)]
    order = [query.partition(" ")[0] for query in fleet.upstream.sent]
    assert order == ["v3", "v3", "v5", "v5", "v7", "v7"]
    assert sorted(group.rollout.header.oldest_version for group in done) == [3, 5, 7]


async def test_groups_of_a_learner_that_is_gone_cost_no_quota(fleet: Fleet) -> None:
    await fleet.take()
    await fleet.join("learner", "learner-2", incarnation=2)
    await fleet.until(set())
    fleet.gate.opened.set()
    await asyncio.sleep(0.05)
    assert fleet.upstream.sent == []
