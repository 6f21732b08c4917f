"""A broker with the run's key that breaks the rules: what a client holds for it stays bounded, and it recovers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import zmq
import zmq.asyncio

from common import messages as m
from common.transport import line
from common.transport.client import BrokerClient
from common.transport.keys import create_run_keys, load_run_keys, secure_server

LIMIT = 1 << 20
GRANTS = 5000


class Rogue:
    """A bare socket with the broker's key, driven by the test."""

    def __init__(self, keys_dir: Path) -> None:
        self._context = zmq.asyncio.Context()
        self.socket = self._context.socket(zmq.ROUTER)
        self.socket.linger = 0
        self.socket.router_handover = True
        self.socket.sndhwm = 0
        self.socket.rcvhwm = 1
        self.socket.rcvbuf = 4096
        secure_server(self.socket, load_run_keys(keys_dir, "broker"))
        self.endpoint = f"tcp://127.0.0.1:{self.socket.bind_to_random_port('tcp://127.0.0.1')}"

    async def hears(self, kind: type[m.Hello] | type[m.Heartbeat], seconds: float = 10.0) -> m.AnyToBroker:
        """The next message of a kind."""
        async with asyncio.timeout(seconds):
            while not isinstance(message := await self.next_message(), kind):
                pass
        return message

    async def next_message(self) -> m.AnyToBroker:
        _, first, *_ = await self.socket.recv_multipart()
        return m.decode(first, m.AnyToBroker)

    async def says(self, message: m.AnyFromBroker, *payload: bytes) -> None:
        await self.socket.send_multipart([b"worker", m.encode(message), *payload])

    async def welcomes(self, epoch: int, heartbeat_s: float = 0.05) -> None:
        await self.hears(m.Hello)
        await self.says(m.Welcome(epoch, heartbeat_s, None))

    def close(self) -> None:
        self.socket.close()
        self._context.term()


@pytest.fixture
async def rogue(tmp_path: Path) -> AsyncIterator[Rogue]:
    create_run_keys(tmp_path / "keys")
    rogue = Rogue(tmp_path / "keys")
    yield rogue
    rogue.close()


Join = Callable[[m.Role], Awaitable[BrokerClient]]


@pytest.fixture
async def join(rogue: Rogue, tmp_path: Path) -> AsyncIterator[Join]:
    joined: list[BrokerClient] = []

    async def join(role: m.Role) -> BrokerClient:
        keys = load_run_keys(tmp_path / "keys", role)
        client = BrokerClient(rogue.endpoint, keys, role, "worker", max_frame_bytes=LIMIT)
        client._line.socket.sndbuf = 4096
        joined.append(client)
        await asyncio.gather(client.start(10), rogue.welcomes(1))
        return client

    yield join
    for client in joined:
        await client.close()


def lease(number: int) -> m.Assign:
    return m.Assign(m.LeaseRef("rollout", number, number))


@pytest.mark.parametrize("oversized", [LIMIT + 1, 64 * LIMIT])
async def test_a_frame_above_the_limit_never_arrives_and_the_client_comes_back(
    rogue: Rogue, join: Join, oversized: int
) -> None:
    client = await join("actor")
    client.serve("rollout", 4)
    await rogue.says(lease(1), bytes(oversized))
    await rogue.welcomes(2)  # on a new connection: libzmq has closed the one before for good
    await rogue.says(lease(2), bytes(LIMIT - 100))
    work = await asyncio.wait_for(client.assignments.get(), 5)
    assert (work.lease.item, len(work.payload[0])) == (2, LIMIT - 100)
    assert client.assignments.empty()


async def test_a_message_of_too_many_or_too_large_frames_is_dropped(rogue: Rogue, join: Join) -> None:
    client = await join("actor")
    client.serve("rollout", 4)
    await rogue.says(lease(1), *[b""] * 100)
    await rogue.says(lease(2), *[bytes(LIMIT - 100)] * 6)
    await rogue.says(lease(3), *[bytes(LIMIT - 100)] * 5)
    assert (await asyncio.wait_for(client.assignments.get(), 5)).lease.item == 2
    assert (await asyncio.wait_for(client.assignments.get(), 5)).lease.item == 3
    assert client._line.dropped == 1


async def test_leases_beyond_the_credit_are_not_taken(rogue: Rogue, join: Join) -> None:
    client = await join("actor")
    client.serve("rollout", 2)
    for number in range(1, 11):
        await rogue.says(lease(number), b"ticket")
    heartbeat = await rogue.hears(m.Heartbeat)
    while heartbeat.newest_seen.get("rollout") != 10:
        heartbeat = await rogue.hears(m.Heartbeat)
    assert [held.item for held in heartbeat.held] == [1, 2], "the others are known to be lost: they go elsewhere"
    assert client.assignments.qsize() == 2
    await rogue.says(m.Welcome(2, 0.05, None))  # what was held does not count any more
    await rogue.says(lease(11), b"ticket")
    while client.assignments.qsize() != 1:
        await asyncio.sleep(0.01)
    assert client.assignments.get_nowait().lease.item == 11


async def test_what_goes_to_a_broker_that_does_not_read_is_bounded_and_not_lost(
    rogue: Rogue, join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each grant of a slot that nobody asked for is answered; unread answers make the client stop reading."""
    monkeypatch.setattr(line, "MAX_WAITING", 50)
    client = await join("rewarder")
    for number in range(GRANTS):
        await rogue.says(m.SlotGrant(1 << 30, number, number, 1.0, 0.0))
    most = 0
    for _ in range(50):
        await asyncio.sleep(0.02)
        most = max(most, client._line.waiting)
    assert 50 < most <= 55, "and heartbeats, of which the newest waits"
    assert client._line.waiting_bytes < 10_000
    answered: list[int] = []
    async with asyncio.timeout(20):
        while len(answered) < GRANTS:
            message = await rogue.next_message()
            if isinstance(message, m.SlotReplied):
                answered.append(message.slot)
    assert answered == list(range(GRANTS)), "every one, once, in order"
    assert client._line.waiting_bytes == 0
