"""Processes for `test_broker_fuzz`: a broker to attack, those that attack it, an actor to stop. Run as a script.

They are processes of their own so that the broker's memory can be measured, an attacker does not slow the good peers'
event loop, and an actor can be stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

import psutil
import zmq

from common import messages as m
from common.broker.server import BrokerServer
from common.broker.service import BrokerService, BrokerSettings
from common.transport.keys import load_run_keys, secure_client
from tests.common.broker_world import next_assignment, peer, rollout
from tests.common.malformed import Malformer, valid_messages

ROOT = Path(__file__).parents[2]
SEED = 20_240_229
MESSAGES = 200_000
WAVES = 10  # processes that send them, one after the other
DIFFERENT = MESSAGES // WAVES  # messages drawn; every wave sends them in another division among its names
PER_NAME = 500  # messages the attacker sends under one name
NAMES_AT_ONCE = 4
OVERSIZED = 20  # messages of each kind that is too large in some way
BAD_FRAMES_ALLOWED = 200  # so that about half of all messages reach the decoder, and the others a ban
LEASE_S = 10.0
MAX_FRAME_BYTES = 1 << 20
OUTSTANDING = 4  # groups of the good peers under way
# Keys that the attackers hold. One with the learner's could lead the run under a larger incarnation; those here have
# the small incarnations of what they replay, and only send garbage.
ROLES: tuple[m.Role, ...] = ("actor", "rewarder", "monitor", "learner")
GOOD_INCARNATION = 1 << 52


class CountingServer(BrokerServer):
    """Counts what attackers send, read or dropped."""

    attacks = 0

    def _sender(self, identity: zmq.Frame, first: zmq.Frame) -> tuple[str, m.Role] | None:
        self.attacks += b"-bad-" in identity.bytes
        return super()._sender(identity, first)


def serve(keys_dir: Path) -> None:
    """A broker; prints its endpoint, then its counters for every line it reads, until end of input."""
    settings = BrokerSettings(
        epoch=1, lease_s=LEASE_S, heartbeat_s=0.5, quota=(4, 1.0, 1.0), bad_frames_allowed=BAD_FRAMES_ALLOWED
    )
    service = BrokerService(settings, time.monotonic())
    server = CountingServer(service, load_run_keys(keys_dir, "broker"), MAX_FRAME_BYTES)
    print(server.bind("127.0.0.1", 0), flush=True)
    ended = threading.Event()

    def answer() -> None:
        for _ in sys.stdin:
            counters = {
                "attacks": server.attacks,
                "handled": service.handled_messages,
                "rejected": service.rejected_frames,
                "dropped": server.dropped_messages,
                "bans": service.conduct.bans,
            }
            print(json.dumps(counters), flush=True)
        ended.set()

    threading.Thread(target=answer, daemon=True).start()
    server.run(ended.is_set)


def attack(keys_dir: Path, endpoint: str, mark: Path, wave: int) -> None:
    """Send one wave, each few messages under a new name, and read nothing; then wait for a line to end.

    A connection closed with replies unread is reset, and what it sent is lost: so the names stay until the end.
    """
    malformer = Malformer(SEED, mark)
    messages = [malformer.message() for _ in range(DIFFERENT)]
    random.Random(wave).shuffle(messages)
    context = zmq.Context()
    lines = []
    for first in range(0, DIFFERENT, PER_NAME * NAMES_AT_ONCE):
        newest = [_attacker(context, keys_dir, endpoint, wave * 1000 + len(lines) + n) for n in range(NAMES_AT_ONCE)]
        for number, frames in enumerate(messages[first : first + PER_NAME * NAMES_AT_ONCE]):
            newest[number % NAMES_AT_ONCE].send_multipart(frames)
        lines += newest
    _end_when_told(context, lines)


def attack_with_size(keys_dir: Path, endpoint: str, mark: Path) -> None:
    """Too many frames, too many bytes in all, too large frames (for which libzmq closes the connection)."""
    malformer = Malformer(SEED + 1, mark)
    hello = valid_messages()[0]
    context = zmq.Context()
    lines = []
    for number in range(OVERSIZED):
        lines += [_attacker(context, keys_dir, endpoint, 1_000_000 + 20 * number + n) for n in range(3)]
        lines[-3].send_multipart(malformer.too_many_frames())
        lines[-2].send_multipart([*hello, *[bytes(MAX_FRAME_BYTES - 100)] * 6])
        lines[-1].send_multipart([*hello, bytes(MAX_FRAME_BYTES + 1)])
    _end_when_told(context, lines)


def _end_when_told(context: zmq.Context[zmq.Socket[bytes]], lines: list[Any]) -> None:
    print("sent", flush=True)
    sys.stdin.readline()
    for line in lines:
        line.close(linger=0)
    context.term()


def _attacker(context: zmq.Context[zmq.Socket[bytes]], keys_dir: Path, endpoint: str, number: int) -> Any:
    role: m.Role = ROLES[number % len(ROLES)]
    keys = load_run_keys(keys_dir, role)
    line = context.socket(zmq.DEALER)
    line.identity = b"\xff-bad-%d" % number if number % 19 == 18 else b"%s-bad-%d" % (role.encode(), number)
    secure_client(line, keys, keys.public["broker"])
    line.connect(endpoint)
    return line


class AttackedBroker:
    """The broker's process and its counters."""

    def __init__(self, keys_dir: Path) -> None:
        self.process = start_script("serve", str(keys_dir), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.endpoint = self._pipe(self.process.stdout).readline().strip()
        self._memory = psutil.Process(self.process.pid)

    def counters(self) -> dict[str, int]:
        pipe = self._pipe(self.process.stdin)
        pipe.write("?\n")
        pipe.flush()
        return json.loads(self._pipe(self.process.stdout).readline())

    def resident_bytes(self) -> int:
        return self._memory.memory_info().rss

    def stop(self) -> None:
        self._pipe(self.process.stdin).close()
        self.process.wait(timeout=20)

    def _pipe(self, pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe


def start_script(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, __file__, *arguments], env=environment, text=True, **options)


def act(keys_dir: Path, endpoint: str) -> None:
    """An actor that answers every ticket, until it is told the state that ends it."""

    async def work() -> None:
        async with peer(endpoint, keys_dir, "actor") as actor:
            actor.serve("rollout", OUTSTANDING)
            await actor.fleet_status()  # the broker has read what was sent before
            print("ready", flush=True)
            finished = asyncio.create_task(actor.wait_for_state(lambda state: state.finished))
            while not finished.done():
                with contextlib.suppress(TimeoutError):
                    assignment = await next_assignment(actor, 0.1)
                    actor.complete(assignment, m.encode_rollout(rollout(assignment.lease.item)))
            assert actor.state is not None
            print(actor.state.version, flush=True)

    asyncio.run(work())


if __name__ == "__main__":
    command, folder, *rest = sys.argv[1:]
    if command == "serve":
        serve(Path(folder))
    elif command == "act":
        act(Path(folder), rest[0])
    elif command == "size":
        attack_with_size(Path(folder), rest[0], Path(rest[1]))
    else:
        attack(Path(folder), rest[0], Path(rest[1]), int(rest[2]))
