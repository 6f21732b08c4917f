"""What a unit of quota buys: samples of a training stream scored per request upstream. Part of `reward_throughput`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import aiohttp
import numpy as np

from benchmarks.rewarder_fleet import RewarderFleet
from benchmarks.training_stream import GROUP, Group
from common import messages as m
from common.scores import InvalidOutput, Scored
from common.tasks import Task
from common.tasks.row import to_reference
from common.transport.client import Assignment, BrokerClient
from rewarders.answerers.search import SearchAnswerer
from rewarders.engines.pubmed import PubMedEngine, PubMedSettings
from rewarders.loop import Rewarder
from rewarders.scoring import Scorer

QUOTA_PER_S = 10
SAMPLES_PER_UNIT_GUESS = 1.2  # only decides how much of the stream the paced part takes
CONCURRENT_GROUPS = 8
SCORED_WITHIN_S = 300.0


class Feed:
    """Hands a stream to a rewarder in the broker's place, so that leases can be gone at a chosen moment."""

    name = "rewarder-0"

    def __init__(self, groups: Sequence[Group]) -> None:
        self.assignments: asyncio.Queue[Assignment] = asyncio.Queue()
        self.done = asyncio.Event()
        self.samples = 0
        self.failure = ""
        self._source = enumerate(groups)
        self._held: set[m.LeaseRef] = set()

    def serve(self, stage: m.StageName, capacity: int) -> None:
        """Credit: so many leases at a time, and all the stale ones that come between."""
        for _ in range(capacity):
            self._assign()

    def _assign(self) -> None:
        for number, group in self._source:
            lease = m.LeaseRef("score", number, number + 1)
            self.assignments.put_nowait(Assignment(lease, _payload(number, group)))
            if not group.stale:
                self._held.add(lease)
                return
        if not self._held:
            self.done.set()

    def set_status(self, phase: str, waits_for: str = "", counters: dict[str, float] | None = None) -> None:
        """Nobody asks."""

    def holds(self, assignment: Assignment) -> bool:
        return assignment.lease in self._held

    def complete(self, assignment: Assignment, payload: m.Payload) -> None:
        self._held.remove(assignment.lease)
        self.samples += len(m.decode(payload[0], m.GroupScores).scores)
        self._assign()

    def release(self, assignment: Assignment, delay_s: float, reason: str) -> None:
        self._held.discard(assignment.lease)
        self.failure = reason
        self.done.set()

    async def wait_for_state(self, _: object) -> None:
        await self.done.wait()


def _payload(number: int, group: Group) -> list[memoryview]:
    sampling = m.Sampling(samples=GROUP, temperature=1.0, top_p=1.0, max_tokens=512)
    message = (m.ChatMessage("user", group.row.text),)
    ticket = m.Ticket(number, "train", group.row.id, 0, message, to_reference(group.row), sampling, 0)
    samples = tuple(m.SampleHeader(text, 1, "stop", (m.WeightSpan(0, 0, 1),)) for text in group.texts)
    header = m.RolloutHeader(number, "actor-0", 1, samples)
    ones = np.ones(GROUP, np.int32)
    rollout = m.encode_rollout(m.Rollout(header, ones[:1], ones, ones.astype(np.float32)))
    return [memoryview(m.encode(ticket)), memoryview(rollout[0])]


async def work_off(groups: Sequence[Group], task: Task, url: str) -> dict[str, float]:
    """Let a rewarder score the stream as fast as it can; compare what it asked with what others would have asked.

    Requests are counted by the server itself.
    """
    feed = Feed(groups)
    before = await requests_at(url)
    await score_from(feed, task, PubMedEngine(PubMedSettings(base_url=url, api_key_env=None)))
    units = await requests_at(url) - before
    generated = GROUP * len(groups)
    well_formed = sum(query is not None for group in groups for query in group.queries)
    assert feed.samples == GROUP * sum(not group.stale for group in groups)
    return {
        "samples_per_unit": round(feed.samples / units, 3),
        "one_call_per_sample": round(feed.samples / generated, 3),
        "two_calls_per_sample": round(feed.samples / (2 * well_formed), 3),
        "scored": feed.samples,
        "units": units,
    }


async def score_from(feed: Feed, task: Task, engine: PubMedEngine) -> None:
    """Let a rewarder work a feed off."""
    async with SearchAnswerer(task, engine) as answerer:
        rewarder = Rewarder(cast(BrokerClient, feed), Scorer(task, answerer), CONCURRENT_GROUPS)
        await asyncio.wait_for(rewarder.run(), SCORED_WITHIN_S)
    if feed.failure:
        raise RuntimeError(f"the local server fails: {feed.failure}")


async def paced(groups: Sequence[Group], folder: Path, url: str, top_k: int, seconds: float) -> dict[str, Any]:
    """Send the first groups of the stream, those that are not stale, through a real broker's quota to a real rewarder
    process; so many that the quota is busy for about `seconds`.
    """
    wanted = [group for group in groups if not group.stale]
    wanted = wanted[: max(1, round(seconds * QUOTA_PER_S * SAMPLES_PER_UNIT_GUESS / GROUP))]
    settings = [f"search.url={url}", f"search.retmax={top_k}", "search.timeout_s=2"]
    quota = [f"search.quota.requests={QUOTA_PER_S}", "search.quota.window_s=1"]
    before = await requests_at(url)
    scored = 0
    async with RewarderFleet(folder, [*settings, *quota], capacity=len(wanted)) as fleet:
        fleet.start_rewarder("rewarder-0")
        for number, group in enumerate(wanted):
            fleet.send(number, group.row, group.texts)
        began = await first_request(url, before)
        for _ in wanted:
            result = await asyncio.wait_for(fleet.receive(), SCORED_WITHIN_S)
            assert all(isinstance(score, Scored | InvalidOutput) for score in result.scores)
            scored += len(result.scores)
        took = time.monotonic() - began
        granted = (await fleet.learner.fleet_status()).slots_granted
    units = await requests_at(url) - before
    return {
        "seconds": round(took, 1),
        "units": units,
        "slots_granted": granted,
        "units_per_s": round(units / took, 2),
        "scored": scored,
        "samples_per_unit": round(scored / units, 3),
    }


async def first_request(url: str, before: int) -> float:
    """Wait until the quota opens (a broker that starts keeps it closed at first); that time."""
    deadline = time.monotonic() + SCORED_WITHIN_S
    while await requests_at(url) == before:
        assert time.monotonic() < deadline, "no request comes"
        await asyncio.sleep(0.02)
    return time.monotonic()


async def requests_at(url: str) -> int:
    """Searches the server has got so far."""
    async with aiohttp.ClientSession() as session, session.get(f"{url}/health") as response:
        return int((await response.json())["requests"])
