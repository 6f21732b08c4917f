"""The actor's loop on a real broker, with a real engine interface and weights that really travel."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from actors.engine import Completion, Engine, EngineOptions, GenerationRequest, WeightUpdate
from actors.loop import Actor
from actors.weight_receiver import WeightReceiver
from common import messages as m
from common.broker.server import BrokerServer
from common.broker.service import BrokerService, BrokerSettings
from common.transport.client import BrokerClient
from common.transport.keys import create_run_keys, load_run_keys
from common.weights import file_checksum
from learner.weight_server import WeightServer


class ScriptedEngine(Engine):
    """Returns the bytes of the weight file as tokens, so that a test sees which weights generated what."""

    name = "scripted"

    def __init__(self) -> None:
        super().__init__(EngineOptions())
        self.weights = b""
        self.hold = asyncio.Event()
        self.hold.set()

    async def start(self, model_dir: Path, version: int) -> None:
        self.weight_version = version

    async def generate(self, request: GenerationRequest) -> list[Completion]:
        self._meter.begin()
        await self.hold.wait()
        token_ids = np.frombuffer(self.weights, np.uint8).astype(np.int32)
        spans = (m.WeightSpan(self.weight_version, 0, len(token_ids)),)
        completion = Completion(token_ids, np.zeros(len(token_ids), np.float32), "text", "stop", spans)
        self._meter.end([completion])
        return [completion] * request.n

    async def load_weights(self, weights: Path, version: int) -> WeightUpdate:
        self.weights = weights.read_bytes()
        self.weight_version = version
        return WeightUpdate(version, 1, len(self.weights), 0.0, 0.0)

    async def close(self) -> None:
        self.hold.set()


class World:
    """A broker, a learner's line to it, and a weight server."""

    def __init__(self, tmp_path: Path) -> None:
        self.keys_dir = tmp_path / "keys"
        create_run_keys(self.keys_dir)
        service = BrokerService(BrokerSettings(epoch=1, heartbeat_s=0.1), time.monotonic())
        self._server = BrokerServer(service, load_run_keys(self.keys_dir, "broker"))
        self.endpoint = self._server.bind("127.0.0.1", 0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._server.run, args=(self._stop.is_set, 0.05))
        self._thread.start()
        keys = load_run_keys(self.keys_dir, "learner")
        self._key = keys.own.public.decode()
        self._weights = WeightServer(tmp_path / "weights", keys, "127.0.0.1")
        self.learner = BrokerClient(self.endpoint, keys, "learner", "learner", incarnation=1)

    def publish(self, version: int, content: bytes, checksum: str | None = None, incarnation: int = 1) -> None:
        path = self._weights.path_of(version)
        path.write_bytes(content)
        self._weights.publish(version)
        checksum = checksum or file_checksum(path)
        self.learner.announce(m.RunState(incarnation, version, self._weights.endpoint, self._key, checksum))

    def close(self) -> None:
        self._weights.close()
        self._stop.set()
        self._thread.join()


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path)
    await world.learner.start()
    yield world
    await world.learner.close()
    await asyncio.to_thread(world.close)


class RunningActor:
    def __init__(self, world: World, tmp_path: Path, groups: int = 4) -> None:
        keys = load_run_keys(world.keys_dir, "actor")
        self.engine = ScriptedEngine()
        self.client = BrokerClient(world.endpoint, keys, "actor", "actor-1")
        self.receiver = WeightReceiver(keys, tmp_path)
        self.actor = Actor(self.client, self.engine, self.receiver, encode, groups)

    async def __aenter__(self) -> RunningActor:
        await self.client.start()
        self.task = asyncio.create_task(self.actor.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        await self.client.close()
        self.receiver.close()


def encode(messages: Sequence[m.ChatMessage]) -> list[int]:
    return [ord(character) for character in messages[0].content]


def ticket(number: int, min_version: int = 0) -> m.Ticket:
    sampling = m.Sampling(samples=2, temperature=1.0, top_p=1.0, max_tokens=8)
    messages = (m.ChatMessage("user", "hi"),)
    return m.Ticket(number, "train", f"q{number}", 0, messages, {}, sampling, min_version)


async def next_rollout(rewarder: BrokerClient) -> m.RolloutHeader:
    assignment = await asyncio.wait_for(rewarder.assignments.get(), 5)
    return m.decode(assignment.payload[1], m.RolloutHeader)


async def until(satisfied: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not satisfied():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


@pytest.fixture
async def rewarder(world: World) -> AsyncIterator[BrokerClient]:
    client = BrokerClient(world.endpoint, load_run_keys(world.keys_dir, "rewarder"), "rewarder", "rewarder-1")
    await client.start()
    client.serve("score", 100)
    yield client
    await client.close()


async def test_an_actor_that_joins_late_generates_with_the_newest_weights_first(
    world: World, rewarder: BrokerClient, tmp_path: Path
) -> None:
    world.publish(40, b"forty")
    world.learner.submit([ticket(1)])
    async with RunningActor(world, tmp_path):
        header = await next_rollout(rewarder)
    assert [span.version for sample in header.samples for span in sample.spans] == [40, 40]
    assert header.samples[0].tokens == len(b"forty")
    assert header.prompt_tokens == 2


async def test_a_ticket_waits_for_the_version_it_asks_for(world: World, rewarder: BrokerClient, tmp_path: Path) -> None:
    world.publish(1, b"one")
    async with RunningActor(world, tmp_path) as running:
        world.learner.submit([ticket(1, min_version=2)])
        await asyncio.sleep(0.4)
        assert rewarder.assignments.empty()
        world.publish(2, b"two!")
        assert (await next_rollout(rewarder)).oldest_version == 2
        assert running.engine.weight_version == 2


async def test_weights_with_a_wrong_checksum_are_not_loaded(
    world: World, rewarder: BrokerClient, tmp_path: Path
) -> None:
    world.publish(1, b"one")
    async with RunningActor(world, tmp_path) as running:
        world.learner.submit([ticket(1)])
        await next_rollout(rewarder)
        world.publish(2, b"corrupt", checksum="0" * 64)
        await asyncio.sleep(0.5)
        assert running.engine.weights == b"one"
        world.publish(3, b"three")
        world.learner.submit([ticket(2, min_version=3)])
        assert (await next_rollout(rewarder)).oldest_version == 3


async def test_generations_for_an_earlier_learner_are_given_up(
    world: World, rewarder: BrokerClient, tmp_path: Path
) -> None:
    world.publish(7, b"seven")
    async with RunningActor(world, tmp_path) as running:
        running.engine.hold.clear()
        world.learner.submit([ticket(1)])
        while not running.engine.stats.running_requests:
            await asyncio.sleep(0.01)
        keys = load_run_keys(world.keys_dir, "learner")
        restarted = BrokerClient(world.endpoint, keys, "learner", "learner-2", incarnation=2)
        await restarted.start()
        world.learner, old = restarted, world.learner
        world.publish(3, b"older version", incarnation=2)
        running.engine.hold.set()
        world.learner.submit([ticket(1)])
        header = await next_rollout(rewarder)
        assert header.oldest_version == 3, "the version of the restarted learner counts, although it is lower"
        await asyncio.sleep(0.2)
        assert rewarder.assignments.empty(), "the group of the earlier learner never arrives"
        await old.close()


async def test_draining_finishes_what_was_begun_and_takes_nothing_new(
    world: World, rewarder: BrokerClient, tmp_path: Path
) -> None:
    world.publish(1, b"one")
    async with RunningActor(world, tmp_path, groups=1) as running:
        running.engine.hold.clear()
        world.learner.submit([ticket(1), ticket(2)])
        while not running.engine.stats.running_requests:
            await asyncio.sleep(0.01)
        running.actor.drain()
        running.engine.hold.set()
        await asyncio.wait_for(running.task, 5)
        assert (await next_rollout(rewarder)).ticket_id == 1
        await asyncio.sleep(0.2)
        assert rewarder.assignments.empty()
        assert (await world.learner.fleet_status()).stages["rollout"].queued == 1


async def test_the_actor_ends_when_the_run_is_finished(world: World, tmp_path: Path) -> None:
    world.publish(1, b"one")
    async with RunningActor(world, tmp_path) as running:
        world.learner.announce(m.RunState(1, 1, finished=True))
        await asyncio.wait_for(running.task, 5)


async def test_an_actor_that_joins_late_begins_with_the_newest_weights(
    world: World, rewarder: BrokerClient, tmp_path: Path
) -> None:
    for version in range(38, 41):
        world.publish(version, b"w%d" % version)
    world.learner.submit([ticket(1, min_version=38), ticket(2, min_version=40)])
    async with RunningActor(world, tmp_path):
        for _ in range(2):
            header = await next_rollout(rewarder)
            assert [sample.spans for sample in header.samples] == [(m.WeightSpan(40, 0, 3),)] * 2


async def test_a_new_learner_voids_what_has_begun_and_not_what_waits_for_its_weights(
    world: World, rewarder: BrokerClient, tmp_path: Path
) -> None:
    world.publish(1, b"old")
    world.learner.submit([ticket(1)])
    async with RunningActor(world, tmp_path) as running:
        running.engine.hold.clear()
        await until(lambda: len(running.actor._decoding) == 1)
        successor = BrokerClient(
            world.endpoint, load_run_keys(world.keys_dir, "learner"), "learner", "learner-2", incarnation=2
        )
        await successor.start()
        successor.submit([ticket(1)])  # it waits in the actor: the weights of this learner are not there yet
        await until(lambda: len(running.actor._generations) == 2)
        world.learner, first = successor, world.learner
        world.publish(2, b"new", incarnation=2)
        await until(lambda: running.engine.weights == b"new")
        running.engine.hold.set()
        header = await next_rollout(rewarder)
        assert header.samples[0].spans == (m.WeightSpan(2, 0, 3),)
        assert not running.client._held, "no lease is kept alive for work that was given up"
        world.learner = first
        await successor.close()


async def test_a_generation_that_fails_is_given_to_others(
    world: World, rewarder: BrokerClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.publish(1, b"abc")
    async with RunningActor(world, tmp_path) as running:
        working = running.engine.generate
        failures = [RuntimeError("out of memory")]

        async def fails_once(request: GenerationRequest) -> list[Completion]:
            if failures:
                raise failures.pop()
            return await working(request)

        monkeypatch.setattr(running.engine, "generate", fails_once)
        world.learner.submit([ticket(1)])
        assert (await next_rollout(rewarder)).ticket_id == 1
        assert failures == []
