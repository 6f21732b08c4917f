"""The processes of `benchmarks.broker`: the broker or a bare forwarder in the middle, and nine lean peers around it."""

from __future__ import annotations

import cProfile
import itertools
import multiprocessing
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import psutil
import zmq

from common import messages as m
from common.broker.server import BrokerServer
from common.broker.service import BrokerService, BrokerSettings
from common.scores import Scored
from common.transport.keys import load_run_keys, secure_client, secure_server

SPAWN = multiprocessing.get_context("spawn")

System = Literal["broker", "raw"]
Frames = list[bytes | memoryview]

ACTORS, REWARDERS = 4, 4
CREDIT = 32  # leases one actor or rewarder holds
LEARNER_CREDIT = 512
WARM_UP_S = 0.5
DRAIN_S = 20.0
Number = msgspec.defstruct("Number", [("ticket_id", int)])  # decodes quickly: other fields are skipped
STATIONS: dict[m.Role, m.StageName] = {"actor": "rollout", "rewarder": "score", "learner": "train"}


@dataclass(frozen=True)
class Sizes:
    """Size of a group."""

    samples: int
    tokens: int


class Group:
    """One ready-made group of realistic size; only its ticket's number varies."""

    def __init__(self, sizes: Sizes) -> None:
        rng = random.Random(0)
        words = [f"{rng.choice('bcdfglmnprst')}{rng.choice('aeiou')}{rng.randrange(1000):x}tion" for _ in range(500)]

        def text(characters: int) -> str:
            return " ".join(rng.choice(words) for _ in range(characters // 7))

        tokens = np.random.default_rng(0)
        total = sizes.samples * sizes.tokens
        self._chat = (m.ChatMessage("system", text(600)), m.ChatMessage("user", text(900)))
        self._sampling = m.Sampling(sizes.samples, temperature=1.0, top_p=1.0, max_tokens=sizes.tokens)
        span = (m.WeightSpan(0, 0, sizes.tokens),)
        self._samples = tuple(
            m.SampleHeader(text(4 * sizes.tokens), sizes.tokens, "stop", span) for _ in range(sizes.samples)
        )
        metrics = {"recall": 0.5, "precision": 0.1, "think_chars": 1800.0, "think_words": 300.0, "query_chars": 180.0}
        self._scores = (Scored(0.5, metrics, text(180), 1234),) * sizes.samples
        arrays = m.Rollout(
            self.header(0),
            np.arange(300, dtype=np.int32),
            tokens.integers(0, 150_000, total).astype(np.int32),
            -tokens.exponential(size=total).astype(np.float32),
        )
        self.arrays: Frames = [bytes(frame) for frame in m.encode_rollout(arrays)[1:]]

    def ticket(self, number: int) -> bytes:
        """An encoded ticket."""
        reference = {"relevant": [str(30_000_000 + i) for i in range(20)]}
        return m.encode(m.Ticket(number, "train", f"q{number}", 0, self._chat, reference, self._sampling, 0))

    def header(self, number: int) -> m.RolloutHeader:
        """The header of a rollout."""
        return m.RolloutHeader(number, "actor-0", 300, self._samples, 1.5)

    def rollout(self, number: int) -> Frames:
        """The four frames of a rollout."""
        return [m.encode(self.header(number)), *self.arrays]

    def scores(self, number: int) -> bytes:
        """Encoded scores."""
        return m.encode(m.GroupScores(number, "rewarder-0", self._scores, 0.5))


# --------------------------------------------------------------------------- the two middles


def middle_process(system: System, keys_dir: Path, sizes: Sizes, profile: Path | None, tell: Connection) -> None:
    """The broker or the forwarder, until SIGTERM. `tell` is told its endpoint."""
    keys = load_run_keys(keys_dir, "broker")
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    profiler = cProfile.Profile()
    if profile is not None:
        profiler.enable()
    if system == "broker":
        server = BrokerServer(BrokerService(BrokerSettings(epoch=1, lease_s=3600.0), time.monotonic()), keys)
        tell.send(server.bind("127.0.0.1", 0))
        server.run(lambda: bool(stopped))
    else:
        socket = zmq.Context().socket(zmq.ROUTER)
        secure_server(socket, keys)  # without an allow list, which costs nothing once a peer is connected
        socket.sndhwm = socket.rcvhwm = 0
        tell.send(f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}")
        forward(socket, Group(sizes), lambda: bool(stopped))
    if profile is not None:
        profiler.disable()
        profiler.dump_stats(profile)


def forward(socket: zmq.Socket[bytes], group: Group, stop: Callable[[], bool]) -> None:
    """Pass every message on; the first letter of a peer's name is its role."""
    actors = itertools.cycle([b"actor-%d" % number for number in range(ACTORS)])
    rewarders = itertools.cycle([b"rewarder-%d" % number for number in range(REWARDERS)])
    assign = m.encode(m.Assign(m.LeaseRef("score", 1 << 20, 1 << 52)))
    ticket = group.ticket(1 << 20)
    stored = [ticket, *group.rollout(1 << 20)]
    socket.rcvtimeo = 200
    while not stop():
        try:
            frames = socket.recv_multipart(copy=False)
        except zmq.Again:
            continue
        sender = frames[0].bytes
        if len(frames) == 2:  # a ping
            socket.send_multipart(frames, copy=False)
        elif sender.startswith(b"l"):
            socket.send_multipart([next(actors), assign, frames[2]], copy=False)
        elif sender.startswith(b"a"):
            socket.send_multipart([next(rewarders), assign, ticket, frames[2]], copy=False)
        else:
            socket.send_multipart([b"learner", assign, *stored, frames[2]], copy=False)


# --------------------------------------------------------------------------- the peers


class Line:
    """A peer's connection to either middle, the same calls for both."""

    def __init__(self, system: System, endpoint: str, keys_dir: Path, role: m.Role, name: str) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._broker = system == "broker"
        self._complete = m.encode(m.Complete(m.LeaseRef("rollout", 1 << 20, 1 << 52)))
        self.socket = zmq.Context().socket(zmq.DEALER)
        self.socket.identity = name.encode()
        self.socket.sndhwm = self.socket.rcvhwm = 0
        self.socket.linger = 0
        keys = load_run_keys(keys_dir, role)
        secure_client(self.socket, keys, keys.public["broker"])
        self.socket.connect(endpoint)
        self.socket.send(m.encode(m.Hello(role, 1)) if self._broker else b"ping")
        self.socket.recv_multipart()
        if self._broker:
            credit = LEARNER_CREDIT if role == "learner" else CREDIT
            self.socket.send(m.encode(m.Serve(STATIONS[role], credit)))

    def take(self, flags: int = 0) -> tuple[bytes, list[zmq.Frame]]:
        """The next piece of work: what to answer it with, and its payload."""
        while True:
            first, *payload = self.socket.recv_multipart(flags, copy=False)
            if not self._broker:
                return self._complete, payload
            message = m.decode(first.buffer, m.AnyFromBroker)
            if isinstance(message, m.Assign):
                return m.encode(m.Complete(message.lease)), payload
            if isinstance(message, m.Protest | m.Refused):
                raise SystemExit(f"the broker refused a message: {message.reason}")

    def answer(self, complete: bytes, payload: Frames) -> None:
        """Hand in the result."""
        self.socket.send_multipart([complete, *payload], copy=False)

    def confirm(self, complete: bytes) -> None:
        """The learner has its group; the forwarder does not want to know."""
        if self._broker:
            self.socket.send(complete)

    def submit(self, tickets: list[tuple[int, bytes]]) -> None:
        """The learner's tickets; the forwarder knows no batches."""
        if self._broker:
            submit = m.encode(m.Submit(tuple(number for number, _ in tickets)))
            self.socket.send_multipart([submit, *(ticket for _, ticket in tickets)])
        else:
            for _, ticket in tickets:
                self.socket.send_multipart([self._complete, ticket])


def actor_process(system: System, endpoint: str, keys_dir: Path, name: str, sizes: Sizes, tell: Connection) -> None:
    """Answers every ticket at once."""
    line, group = Line(system, endpoint, keys_dir, "actor", name), Group(sizes)
    tell.send("ready")
    while True:
        complete, payload = line.take()
        number = m.decode(payload[0].buffer, m.Ticket).ticket_id
        line.answer(complete, group.rollout(number))


def rewarder_process(system: System, endpoint: str, keys_dir: Path, name: str, sizes: Sizes, tell: Connection) -> None:
    """Scores every rollout at once."""
    line, group = Line(system, endpoint, keys_dir, "rewarder", name), Group(sizes)
    tell.send("ready")
    while True:
        complete, payload = line.take()
        number = m.decode(payload[1].buffer, m.RolloutHeader).ticket_id
        line.answer(complete, [group.scores(number)])


def learner_process(system: System, endpoint: str, keys_dir: Path, name: str, sizes: Sizes, talk: Connection) -> None:
    """Measures what it is told to: ("full", window, seconds) or ("paced", groups per second, seconds)."""
    learner = Learner(Line(system, endpoint, keys_dir, "learner", name), Group(sizes))
    talk.send("ready")
    while True:
        kind, amount, seconds = talk.recv()
        talk.send(learner.full_rate(amount, seconds) if kind == "full" else learner.paced(amount, seconds))


class Learner:
    """Submits tickets and takes groups. In one thread, so its own clock times both ends."""

    def __init__(self, line: Line, group: Group) -> None:
        self._line = line
        self._group = group
        self._numbers = itertools.count()
        self._submitted_at: dict[int, float] = {}  # of the groups under way

    def full_rate(self, window: int, seconds: float) -> float:
        """Groups per second with `window` under way."""
        begin = time.monotonic() + WARM_UP_S
        end = begin + seconds
        arrived = 0
        self._submit(window)
        while (now := time.monotonic()) < end:
            latencies = self._take(end - now)
            arrived += len(latencies) if now >= begin else 0
            self._submit(len(latencies))
        self._drain()
        return arrived / seconds

    def paced(self, rate: float, seconds: float) -> list[float]:
        """Seconds from submission to arrival of every group, submitted at an even rate."""
        begin = time.monotonic()
        submitted = 0
        latencies: list[float] = []
        while (now := time.monotonic()) < begin + seconds:
            due = int((now - begin) * rate) + 1 - submitted
            self._submit(due)
            submitted += due
            latencies += self._take(begin + submitted / rate - time.monotonic())
        return latencies + self._drain()

    def _submit(self, count: int) -> None:
        if count:
            numbers = list(itertools.islice(self._numbers, count))
            self._submitted_at.update(dict.fromkeys(numbers, time.monotonic()))
            self._line.submit([(number, self._group.ticket(number)) for number in numbers])

    def _take(self, wait_s: float) -> list[float]:
        """Latencies of the groups that have arrived; waits at most `wait_s` for the first."""
        latencies = []
        if not self._line.socket.poll(int(wait_s * 1000) + 1 if wait_s > 0 else 0):
            return []
        while True:
            try:
                complete, payload = self._line.take(zmq.NOBLOCK)
            except zmq.Again:
                return latencies
            self._line.confirm(complete)
            number = m.decode(payload[5].buffer, Number).ticket_id
            latencies.append(time.monotonic() - self._submitted_at.pop(number))

    def _drain(self) -> list[float]:
        give_up = time.monotonic() + DRAIN_S
        latencies: list[float] = []
        while self._submitted_at:
            latencies += self._take(1.0)
            if time.monotonic() > give_up:
                raise SystemExit(f"{len(self._submitted_at)} groups never arrived")
        return latencies


# --------------------------------------------------------------------------- the whole


class Fleet:
    """One middle and its nine peers, running."""

    def __init__(self, system: System, keys_dir: Path, sizes: Sizes, profile: Path | None = None) -> None:
        self._processes: list[BaseProcess] = []
        middle = self._start(middle_process, system, keys_dir, sizes, profile)
        endpoint = middle.recv()
        peers = [(actor_process, f"actor-{number}") for number in range(ACTORS)]
        peers += [(rewarder_process, f"rewarder-{number}") for number in range(REWARDERS)]
        peers += [(learner_process, "learner")]
        lines = [self._start(target, system, endpoint, keys_dir, name, sizes) for target, name in peers]
        for line in lines:
            line.recv()
        self._learner = lines[-1]
        self._middle = psutil.Process(self._processes[0].pid)

    def _start(self, target: Callable[..., None], *arguments: Any) -> Connection:
        ours, theirs = SPAWN.Pipe()
        process = SPAWN.Process(target=target, args=(*arguments, theirs), daemon=True)
        process.start()
        self._processes.append(process)
        return ours

    def full_rate(self, window: int, seconds: float) -> tuple[float, float]:
        """Groups per second, and CPU seconds of the middle per second."""
        before, started = self._cpu_s(), time.monotonic()
        self._learner.send(("full", window, seconds))
        groups_per_s = self._learner.recv()
        return groups_per_s, (self._cpu_s() - before) / (time.monotonic() - started)

    def latencies_ms(self, rate: float, seconds: float) -> tuple[float, float]:
        """Median and 99th percentile at `rate` groups per second."""
        self._learner.send(("paced", rate, seconds))
        return tuple(1000 * np.percentile(self._learner.recv(), [50, 99]))

    def stop(self) -> None:
        """End its processes: peers first, so that the middle ends idle."""
        for process in reversed(self._processes):
            process.terminate()
            process.join()

    def _cpu_s(self) -> float:
        times = self._middle.cpu_times()
        return times.user + times.system
