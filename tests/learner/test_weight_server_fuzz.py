"""The weight server under attack: by an actor of the run that sends garbage or reads nothing, and by outsiders."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import zmq

from actors.weight_receiver import WeightReceiver
from common import messages as m
from common import weights as w
from common.transport.keys import create_run_keys, load_run_keys, secure_client
from learner.weight_server import BAD_REQUESTS_ALLOWED, CHUNKS_AHEAD, WeightServer

SEED = 7
REQUESTS = 10_000
PER_CONNECTION = 200
SIZE = 3 * w.CHUNK_BYTES + 17
GROWTH_ALLOWED = 48 << 20


@pytest.fixture
def keys_dir(tmp_path: Path) -> Path:
    create_run_keys(tmp_path / "keys")
    return tmp_path / "keys"


@pytest.fixture
def server(tmp_path: Path, keys_dir: Path) -> Iterator[WeightServer]:
    server = WeightServer(tmp_path / "weights", load_run_keys(keys_dir, "learner"), "127.0.0.1")
    server.path_of(1).write_bytes(random.Random(SEED).randbytes(SIZE))
    server.publish(1)
    yield server
    server.close()


class Attackers:
    """Sockets with an actor's key, or with whatever credentials are given."""

    def __init__(self, server: WeightServer, keys_dir: Path) -> None:
        self._server = server
        self._keys = load_run_keys(keys_dir, "actor")
        self.context = zmq.Context()
        self.lines: list[Any] = []

    def line(self, credentials: tuple[bytes, bytes, bytes] | None = None, secured: bool = True) -> Any:
        line = self.context.socket(zmq.DEALER)
        line.linger = 0
        line.rcvhwm = 1
        if credentials is not None:
            line.curve_publickey, line.curve_secretkey, line.curve_serverkey = credentials
        elif secured:
            secure_client(line, self._keys, self._keys.public["learner"])
        line.connect(self._server.endpoint)
        self.lines.append(line)
        return line

    def close(self) -> None:
        for line in self.lines:
            line.close()
        self.context.term()


@pytest.fixture
def attackers(server: WeightServer, keys_dir: Path) -> Iterator[Attackers]:
    attackers = Attackers(server, keys_dir)
    yield attackers
    attackers.close()


def malformed(draw: random.Random) -> list[bytes]:
    """A request that must not be answered: random, flipped, cut, of wrong types, too many parts, out of bounds."""
    valid = m.encode(w.ChunkRequest(1, 0))
    wrong: list[Any] = [
        {"type": "chunk_request", "version": draw.choice([-1, 1.5, "1", None, [], 1 << 60]), "offset": 0},
        {"type": "chunk_request", "version": 1, "offset": SIZE + draw.randrange(1 << 40)},
        {"type": "chunk_request", "version": 1},
        {"type": "chunk_request", "version": 1, "offset": 0, "more": 1},
        {"type": "chunk", "version": 1, "offset": 0, "total": 1},
        [1, 0],
    ]
    kind = draw.randrange(5)
    if kind == 0:
        return [draw.randbytes(draw.randrange(300))]
    if kind == 1:
        return [valid[: draw.randrange(len(valid))]]
    if kind == 2:
        return [valid] * draw.randint(2, 50)
    if kind == 3:
        return [b"\xdf\xff\xff\xff\xff" + valid]
    return [msgspec.msgpack.encode(draw.choice(wrong))]


async def test_malformed_requests_of_an_actor_change_nothing_for_the_others(
    server: WeightServer, keys_dir: Path, tmp_path: Path, attackers: Attackers
) -> None:
    state = m.RunState(
        1,
        1,
        server.endpoint,
        load_run_keys(keys_dir, "learner").own.public.decode(),
        w.file_checksum(server.path_of(1)),
    )
    receiver = WeightReceiver(load_run_keys(keys_dir, "actor"), tmp_path)
    draw, memory = random.Random(SEED), psutil.Process()
    await receiver.pull(state)
    pulled, resident = 0, []
    try:
        for _ in range(REQUESTS // PER_CONNECTION):
            line = attackers.line()
            for _ in range(PER_CONNECTION):
                await asyncio.to_thread(line.send_multipart, malformed(draw))
            await receiver.pull(state)
            pulled += 1
            resident.append(memory.memory_info().rss)
        async with asyncio.timeout(30):
            while server.rejected_requests + server.dropped_requests < REQUESTS:
                await asyncio.sleep(0.05)
    finally:
        receiver.close()
    connections = REQUESTS // PER_CONNECTION
    assert pulled == connections, "a good actor was served throughout"
    assert server.conduct.bans == connections
    assert server.rejected_requests == connections * (BAD_REQUESTS_ALLOWED + 1)
    assert max(resident) - resident[0] < GROWTH_ALLOWED


async def test_an_actor_that_asks_for_much_and_reads_nothing_costs_a_few_chunks(
    server: WeightServer, attackers: Attackers
) -> None:
    deaf = attackers.line()
    for _ in range(500):
        deaf.send(m.encode(w.ChunkRequest(1, 0)))
    async with asyncio.timeout(30):
        while server.handled_requests < 500:
            await asyncio.sleep(0.05)
    answers = 0
    while await asyncio.to_thread(deaf.poll, 500):
        deaf.recv_multipart()
        answers += 1
    assert CHUNKS_AHEAD <= answers < CHUNKS_AHEAD + 16, "and what the kernel and the other side hold; no more is sent"


async def test_without_an_actors_key_of_the_run_no_request_is_read(
    server: WeightServer, keys_dir: Path, tmp_path: Path, attackers: Attackers
) -> None:
    create_run_keys(tmp_path / "other")
    pinned = load_run_keys(keys_dir, "learner").own.public
    other, rewarder = load_run_keys(tmp_path / "other", "actor").own, load_run_keys(keys_dir, "rewarder").own
    own = load_run_keys(keys_dir, "actor").own
    lines = [
        attackers.line(secured=False),
        attackers.line((*zmq.curve_keypair(), pinned)),
        attackers.line((other.public, other.secret, pinned)),
        attackers.line((rewarder.public, rewarder.secret, pinned)),
        attackers.line((own.public, other.secret, pinned)),
    ]
    for _ in range(20):
        for line in lines:
            with contextlib.suppress(zmq.Again):
                line.send(m.encode(w.ChunkRequest(1, 0)), zmq.NOBLOCK)
    host, port = server.endpoint.removeprefix("tcp://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as plain:
        plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
    assert [line.poll(200) for line in lines] == [0] * len(lines)
    assert (server.handled_requests, server.rejected_requests, server.dropped_requests) == (0, 0, 0)
    good = attackers.line()
    good.send(m.encode(w.ChunkRequest(1, 0)))
    assert good.poll(5000), "and who has the key is served"
