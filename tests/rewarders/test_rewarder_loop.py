"""The rewarder's loop on a real broker and a real search server: scores come back, outages do not."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from common import messages as m
from common.broker.server import BrokerServer
from common.broker.service import BrokerService, BrokerSettings
from common.scores import InvalidOutput, Scored
from common.tasks import Hits, ParsedAnswer, Row
from common.tasks.publication_search import PublicationSearch
from common.transport.client import BrokerClient
from common.transport.keys import create_run_keys, load_run_keys
from rewarders.answerers.base import Answerer
from rewarders.engines.pubmed import PubMedEngine, PubMedSettings
from rewarders.errors import FatalScoringError, ScoringError
from rewarders.loop import Rewarder, decode_reference
from rewarders.retry import Retrier, RetryPolicy
from rewarders.scoring import Scorer
from rewarders.servers.pubmed import RunningServer, ServerSettings, serve
from tests.rewarders.search_scorer import search_scorer


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    words = ["heart", "lung", "liver"]
    rows = [{"_id": str(n), "title": word, "text": f"{word} study"} for n, word in enumerate(words)]
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "corpus"


class World:
    """A broker with a learner, an actor's client and a rewarder that asks `url`."""

    def __init__(self, tmp_path: Path) -> None:
        self._keys = tmp_path / "keys"
        create_run_keys(self._keys)
        service = BrokerService(BrokerSettings(epoch=1, heartbeat_s=0.1), time.monotonic())
        self._server = BrokerServer(service, load_run_keys(self._keys, "broker"))
        self._endpoint = self._server.bind("127.0.0.1", 0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._server.run, args=(self._stop.is_set, 0.05))
        self._thread.start()

    async def join(self, role: m.Role) -> BrokerClient:
        client = BrokerClient(self._endpoint, load_run_keys(self._keys, role), role, f"{role}-1", incarnation=1)
        await client.start()
        return client

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path)
    yield world
    await asyncio.to_thread(world.close)


def ticket(number: int) -> m.Ticket:
    reference = {"id": "q", "text": "hearts", "relevant": ["0"], "max_date": None}
    sampling = m.Sampling(samples=3, temperature=1.0, top_p=1.0, max_tokens=8)
    return m.Ticket(number, "train", "q", 0, (m.ChatMessage("user", "hearts"),), reference, sampling, 0)


def rollout(number: int, *texts: str) -> m.Rollout:
    samples = tuple(m.SampleHeader(text, 1, "stop", (m.WeightSpan(0, 0, 1),)) for text in texts)
    ones = np.ones(len(texts), np.int32)
    return m.Rollout(m.RolloutHeader(number, "actor-1", 1, samples), ones[:1], ones, ones.astype(np.float32))


async def scored_group(world: World, url: str, texts: list[str], seconds: float = 10.0) -> m.ScoredGroup | None:
    """One group through the whole broker; None where no score came in time."""
    learner, actor, rewarder = [await world.join(role) for role in ("learner", "actor", "rewarder")]
    task = PublicationSearch(prompt="short", reasoning=False, top_k=10)
    settings = PubMedSettings(base_url=url, timeout_s=1.0, connect_timeout_s=0.5, api_key_env=None)
    async with PubMedEngine(settings) as engine:
        retrier = Retrier(RetryPolicy(attempts=1))
        running = Rewarder(rewarder, search_scorer(task, engine, retrier=retrier), concurrent_groups=4)
        loop = asyncio.create_task(running.run())
        try:
            actor.serve("rollout", 1)
            learner.serve("train", 1)
            learner.submit([ticket(1)])
            work = await asyncio.wait_for(actor.assignments.get(), 5)
            actor.complete(work, m.encode_rollout(rollout(1, *texts)))
            received = await asyncio.wait_for(learner.assignments.get(), seconds)
            return m.decode_scored_group(received.payload)
        except TimeoutError:
            return None
        finally:
            loop.cancel()
            await asyncio.gather(loop, return_exceptions=True)
            for client in (learner, actor, rewarder):
                await client.close()


@pytest.fixture
async def search_server(corpus: Path, tmp_path: Path) -> AsyncIterator[RunningServer]:
    async with await serve(ServerSettings(corpus=corpus, cache_folder=tmp_path / "cache")) as server:
        yield server


async def test_a_group_is_scored_by_the_live_server(world: World, search_server: RunningServer) -> None:
    answers = ["heart OR lung", "liver"]
    texts = [f'<answer>{{"query": "{query}"}}</answer>' for query in answers] + ["no answer"]
    group = await scored_group(world, search_server.base_url, texts)
    assert group is not None
    hit, miss, invalid = group.scores.scores
    assert isinstance(hit, Scored)
    assert (hit.metrics["recall"], hit.reward, hit.query, hit.results) == (1.0, 6.0, "heart OR lung", 2)
    assert isinstance(miss, Scored)
    assert (miss.metrics["recall"], miss.reward) == (0.0, -2.5)
    assert isinstance(invalid, InvalidOutput)
    assert invalid.reward == -4.0


async def test_while_the_engine_is_down_no_score_is_invented(world: World) -> None:
    text = '<answer>{"query": "heart"}</answer>'
    assert await scored_group(world, "http://127.0.0.1:9", [text], seconds=3.0) is None


def test_a_reference_of_another_task_is_refused() -> None:
    with pytest.raises(ScoringError, match="not a task's row"):
        decode_reference({"sql": "SELECT 1"})


class Replaying(Answerer):
    """An answerer for which waiting is of no use."""

    async def outcome(self, answer: ParsedAnswer, row: Row) -> Hits:
        raise FatalScoringError(f"the recording has no {answer.query!r}")


async def test_what_no_waiting_mends_ends_the_rewarder_and_answers_nothing(world: World) -> None:
    learner, actor, rewarder = [await world.join(role) for role in ("learner", "actor", "rewarder")]
    scorer = Scorer(PublicationSearch(prompt="short", reasoning=False), Replaying())
    loop = asyncio.create_task(Rewarder(rewarder, scorer, concurrent_groups=4).run())
    actor.serve("rollout", 1)
    learner.serve("train", 1)
    learner.submit([ticket(1)])
    work = await asyncio.wait_for(actor.assignments.get(), 10)
    actor.complete(work, m.encode_rollout(rollout(1, '<answer>{"query": "lung"}</answer>', "malformed", "no")))
    with pytest.raises(FatalScoringError, match="the recording has no 'lung'"):
        await asyncio.wait_for(loop, 20)
    assert learner.assignments.empty()
    for client in (learner, actor, rewarder):
        await client.close()


class Waiting(Answerer):
    """Answers when it is told to."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.answer = asyncio.Event()

    async def outcome(self, answer: ParsedAnswer, row: Row) -> Hits:
        self.asked.set()
        await self.answer.wait()
        return Hits(ids=["0"], count=1)


async def test_a_draining_rewarder_finishes_what_it_holds_and_takes_nothing_new(world: World) -> None:
    learner, actor, rewarder = [await world.join(role) for role in ("learner", "actor", "rewarder")]
    answerer = Waiting()
    scorer = Scorer(PublicationSearch(prompt="short", reasoning=False), answerer)
    draining = Rewarder(rewarder, scorer, concurrent_groups=4)
    loop = asyncio.create_task(draining.run())
    actor.serve("rollout", 2)
    learner.serve("train", 2)
    learner.submit([ticket(1), ticket(2)])
    works = [await asyncio.wait_for(actor.assignments.get(), 10) for _ in range(2)]
    text = '<answer>{"query": "heart"}</answer>'
    actor.complete(works[0], m.encode_rollout(rollout(1, text, text, text)))
    await asyncio.wait_for(answerer.asked.wait(), 10)
    draining.drain()
    await rewarder.fleet_status()  # the broker has read that this one takes nothing new
    actor.complete(works[1], m.encode_rollout(rollout(2, text, text, text)))
    status = await actor.fleet_status()
    assert (status.stages["score"].leased, status.stages["score"].queued) == (1, 1)
    assert not loop.done(), "it has a group to finish"
    answerer.answer.set()
    await asyncio.wait_for(loop, 10)
    group = m.decode_scored_group((await asyncio.wait_for(learner.assignments.get(), 10)).payload)
    assert group.ticket.ticket_id == 1
    assert all(isinstance(score, Scored) for score in group.scores.scores)
    status = await learner.fleet_status()
    assert (status.stages["score"].leased, status.stages["score"].queued) == (0, 1), "the other waits for another one"
    for client in (learner, actor, rewarder):
        await client.close()
