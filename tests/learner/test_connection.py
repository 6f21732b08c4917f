"""The learner's line to the broker: every open ticket is answered once, whatever becomes of the broker."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import pytest

from common import messages as m
from common.broker.server import BrokerServer
from common.broker.service import BrokerService, BrokerSettings
from common.scores import Scored
from common.transport.client import BrokerClient
from common.transport.keys import create_run_keys, load_run_keys
from learner.connection import LearnerConnection
from learner.group_queue import GroupQueue


class Broker:
    """A broker that can be replaced by an empty one on the same port."""

    def __init__(self, tmp_path: Path) -> None:
        self.keys_dir = tmp_path / "keys"
        create_run_keys(self.keys_dir)
        self._port = 0
        self._epoch = 1_800_000_000_000
        self._begin()

    def replace(self) -> None:
        self.close()
        self._begin()

    def _begin(self) -> None:
        self._epoch += 2000
        settings = BrokerSettings(epoch=self._epoch, lease_s=2.0, heartbeat_s=0.1)
        self.service = BrokerService(settings, time.monotonic())
        server = BrokerServer(self.service, load_run_keys(self.keys_dir, "broker"))
        self.endpoint = server.bind("127.0.0.1", self._port)
        self._port = int(self.endpoint.rpartition(":")[2])
        self._stop = threading.Event()
        self._thread = threading.Thread(target=server.run, args=(self._stop.is_set, 0.02))
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


class Workers:
    """An actor and a rewarder that answer everything."""

    def __init__(self, broker: Broker) -> None:
        keys = broker.keys_dir
        self.actor = BrokerClient(broker.endpoint, load_run_keys(keys, "actor"), "actor", "actor-1")
        self.rewarder = BrokerClient(broker.endpoint, load_run_keys(keys, "rewarder"), "rewarder", "rewarder-1")
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        await self.actor.start()
        await self.rewarder.start()
        self._tasks = [asyncio.create_task(self._act()), asyncio.create_task(self._reward())]
        self.actor.serve("rollout", 2)
        self.rewarder.serve("score", 2)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.actor.close()
        await self.rewarder.close()

    async def _act(self) -> None:
        while True:
            assignment = await self.actor.assignments.get()
            sample = m.SampleHeader("text", 1, "stop", (m.WeightSpan(0, 0, 1),))
            header = m.RolloutHeader(assignment.lease.item, "actor-1", 1, (sample,))
            one = np.ones(1, np.int32)
            self.actor.complete(assignment, m.encode_rollout(m.Rollout(header, one, one, one.astype(np.float32))))

    async def _reward(self) -> None:
        while True:
            assignment = await self.rewarder.assignments.get()
            scores = m.GroupScores(assignment.lease.item, "rewarder-1", (Scored(1.0, {}, "q", 1),))
            self.rewarder.complete(assignment, [m.encode(scores)])


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    broker = Broker(tmp_path)
    yield broker
    await asyncio.to_thread(broker.close)


async def connect(broker: Broker, incarnation: int = 10) -> LearnerConnection:
    keys = load_run_keys(broker.keys_dir, "learner")
    connection = await asyncio.to_thread(LearnerConnection, broker.endpoint, keys, incarnation)
    connection.announce(m.RunState(incarnation, 0, "tcp://127.0.0.1:1", "", ""))
    return connection


def tickets(*numbers: int) -> list[m.Ticket]:
    sampling = m.Sampling(samples=1, temperature=1.0, top_p=1.0, max_tokens=8)
    message = (m.ChatMessage("user", "hi"),)
    return [m.Ticket(number, "train", f"q{number}", 0, message, {}, sampling, 0) for number in numbers]


async def until(satisfied: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not satisfied():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


def received(connection: LearnerConnection) -> list[int]:
    return sorted(connection.groups.get_nowait().ticket.ticket_id for _ in range(connection.groups.qsize()))


async def test_a_new_broker_gets_the_open_tickets_and_every_one_is_answered_once(broker: Broker) -> None:
    connection = await connect(broker)
    connection.submit(tickets(0, 1, 2, 3))
    await until(lambda: len(broker.service.stages["rollout"]) == 4)
    await asyncio.to_thread(broker.replace)
    workers = Workers(broker)
    await workers.start()
    await until(lambda: connection.groups.qsize() == 4)
    connection.submit(tickets(4))
    await until(lambda: connection.groups.qsize() == 5)
    await asyncio.sleep(0.3)
    assert received(connection) == [0, 1, 2, 3, 4]
    await workers.close()
    await asyncio.to_thread(connection.close)


async def test_a_broker_that_gave_the_learner_up_gets_what_was_sent_meanwhile(broker: Broker) -> None:
    connection = await connect(broker)
    workers = Workers(broker)
    await workers.start()
    broker.service._forget("learner-10")  # as after a silence of twice the lease
    connection.submit(tickets(0, 1))  # lost: the broker answers Who
    await until(lambda: connection.groups.qsize() == 2)
    assert received(connection) == [0, 1]
    await workers.close()
    await asyncio.to_thread(connection.close)


async def test_an_older_learner_is_told_to_end(broker: Broker) -> None:
    newer = await connect(broker, incarnation=11)
    older = LearnerConnection.__new__(LearnerConnection)
    with pytest.raises(ConnectionError):
        await asyncio.to_thread(
            older.__init__,  # type: ignore[misc]
            broker.endpoint,
            load_run_keys(broker.keys_dir, "learner"),
            10,
            timeout_s=2,
        )
    assert older.superseded.is_set()
    assert not newer.superseded.is_set()
    await asyncio.to_thread(newer.close)


async def test_a_learner_that_wakes_up_after_its_successor_started_is_told_to_end(broker: Broker) -> None:
    older = await connect(broker, incarnation=10)
    newer = await connect(broker, incarnation=11)
    older.submit(tickets(7))
    await until(older.superseded.is_set)
    assert len(broker.service.stages["rollout"]) == 0, "tickets of the older one are not taken"
    assert not newer.superseded.is_set()
    await asyncio.to_thread(older.close)
    await asyncio.to_thread(newer.close)


async def test_groups_that_nobody_takes_stay_at_the_broker(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("learner.connection.GROUPS_HERE", 2)
    connection = await connect(broker)
    workers = Workers(broker)
    await workers.start()
    connection.submit(tickets(*range(8)))
    train = broker.service.stages["train"]
    await until(lambda: connection.groups.qsize() == 2 and len(train) == 6)
    await asyncio.sleep(3.0)  # longer than a lease: the learner goes on saying that it holds them
    assert (connection.groups.qsize(), len(train), train.expired) == (2, 6, 0)
    taken: list[int] = []
    await until(lambda: taken.extend(received(connection)) or len(taken) == 8)  # type: ignore[func-returns-value]
    assert sorted(taken) == list(range(8))
    await workers.close()
    await asyncio.to_thread(connection.close)


def test_a_queue_of_groups_is_bounded_in_number_and_bytes() -> None:
    group = m.ScoredGroup(tickets(1)[0], None, None)  # type: ignore[arg-type]
    waiting = GroupQueue(max_groups=2, max_bytes=100)
    waiting.put(group, 1000)  # larger than all, and let in where it is alone
    with pytest.raises(queue.Full):
        waiting.put(group, 1)
    assert waiting.get_nowait() is group
    waiting.put(group, 1)
    assert not waiting.full()
    waiting.put(group, 1)
    assert waiting.full()
    assert (waiting.get(1.0), waiting.get(1.0), waiting.full()) == (group, group, False)
    with pytest.raises(queue.Empty):
        waiting.get(0.01)


class Relay:
    """A TCP relay in front of the broker whose connections can be reset, with whatever is on its way."""

    def __init__(self, target_port: int) -> None:
        self._target = target_port
        self._writers: list[asyncio.StreamWriter] = []
        self._server: asyncio.Server | None = None
        self.hold_back = False

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def reset(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()
        self.hold_back = False

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        await self.reset()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        other_reader, other_writer = await asyncio.open_connection("127.0.0.1", self._target)
        self._writers += [writer, other_writer]
        await asyncio.gather(self._pump(reader, other_writer), self._pump(other_reader, writer))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                if not self.hold_back:
                    writer.write(data)


async def test_what_a_broken_connection_swallowed_is_sent_again(broker: Broker) -> None:
    relay = Relay(int(broker.endpoint.rpartition(":")[2]))
    endpoint = await relay.start()
    keys = load_run_keys(broker.keys_dir, "learner")
    connection = await asyncio.to_thread(LearnerConnection, endpoint, keys, 10)
    connection.announce(m.RunState(10, 0, "tcp://127.0.0.1:1", "", ""))
    await until(lambda: broker.service.state is not None and broker.service.state.weights_endpoint != "")
    relay.hold_back = True
    connection.submit(tickets(0, 1))
    connection.announce(m.RunState(10, 1, "tcp://127.0.0.1:1", "", ""))
    await asyncio.sleep(0.3)
    await relay.reset()
    workers = Workers(broker)
    await workers.start()
    await until(lambda: connection.groups.qsize() == 2)
    assert broker.service.state is not None
    assert broker.service.state.version == 1
    await workers.close()
    await asyncio.to_thread(connection.close)
    await relay.close()
