"""The service of `benchmarks.quota`: stamps what arrives, enforces the limit, answers late.

A request's way: its first byte is read here and stamped with the monotonic clock; it travels on for a while (the
network), which makes its time of arrival; it is counted (the gateway), in the order of arrival; it is worked on; its
answer travels back. Travel is added to the stamp, not measured after a timer: a busy machine is no part of the network.
One counter decides what is admitted and what `Remaining` says, or all three: then what one of them refuses is refused.
"""

from __future__ import annotations

import asyncio
import copy
import heapq
import itertools
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Protocol

from deploy.roles import end_with_parent
from rewarders.servers.quota import FixedWindow, Gcra, SlidingLog, Verdict

BODY = b'{"header":{"type":"esearch"},"esearchresult":{"count":"1","idlist":["1"]}}'
REFUSAL = b'{"error":"API rate limit exceeded","api-key":"0","count":"11","limit":"10"}'


class Admission(Protocol):
    """A counter of `rewarders.servers.quota`."""

    def admit(self, now: float) -> Verdict: ...


COUNTERS: dict[str, Callable[[int, float], Admission]] = {"fixed": FixedWindow, "sliding": SlidingLog, "gcra": Gcra}


@dataclass(frozen=True)
class ServiceSettings:
    """limit per window_s; counter: one of `COUNTERS`, or `all`.

    Seconds of a request: `there_s` and `back_s` plus an exponential jitter of mean `jitter_s` each, work of `work_s`
    plus lognormal(`work_mu`, `work_sigma`). A share `stalls` takes 0.3 to 1.5 s longer, half of them on the way there.
    """

    limit: int
    window_s: float
    counter: str
    seed: int = 0
    there_s: float = 0.02
    back_s: float = 0.02
    jitter_s: float = 0.002
    work_s: float = 0.12
    work_mu: float = -2.8
    work_sigma: float = 0.7
    stalls: float = 0.01


@dataclass
class Tally:
    """What happened: arrivals in ns, seconds from first byte to answer of those answered."""

    arrivals: list[int] = field(default_factory=list)
    admitted: list[int] = field(default_factory=list)
    refused_at: list[int] = field(default_factory=list)
    refused_by: Counter[str] = field(default_factory=Counter)
    round_trips: list[float] = field(default_factory=list)


class Service:
    """Counters, tally and chance, shared by all connections."""

    def __init__(self, settings: ServiceSettings) -> None:
        self.settings = settings
        self.tally = Tally()
        self.rng = random.Random(settings.seed)
        names = list(COUNTERS) if settings.counter == "all" else [settings.counter]
        self._counters = {name: COUNTERS[name](settings.limit, settings.window_s) for name in names}
        self._numbers = itertools.count()
        self._travelling: list[tuple[int, int, asyncio.Future[tuple[bool, int]]]] = []  # a heap: arrival in ns, number

    async def answer(self, began_ns: int) -> bytes:
        """Take one request from its first byte to its answer."""
        settings, rng = self.settings, self.rng
        stall = rng.uniform(0.3, 1.5) if rng.random() < settings.stalls else 0.0
        late_there = rng.random() < 0.5
        travel_s = settings.there_s + rng.expovariate(1 / settings.jitter_s) + stall * late_there
        admitted, remaining = await self._arrive(began_ns + round(1e9 * travel_s))
        if admitted:
            work_s = settings.work_s + rng.lognormvariate(settings.work_mu, settings.work_sigma)
            await asyncio.sleep(work_s + stall * (not late_there))
        await asyncio.sleep(settings.back_s + rng.expovariate(1 / settings.jitter_s))
        if admitted:
            self.tally.round_trips.append((time.monotonic_ns() - began_ns) / 1e9)
        return self._reply(admitted, remaining)

    async def _arrive(self, at_ns: int) -> tuple[bool, int]:
        """What the counters say of an arrival, counted when all earlier ones are."""
        verdict: asyncio.Future[tuple[bool, int]] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._travelling, (at_ns, next(self._numbers), verdict))
        await asyncio.sleep(max(0.0, (at_ns - time.monotonic_ns()) / 1e9))
        while not verdict.done():
            arrived_ns, _, earliest = heapq.heappop(self._travelling)
            earliest.set_result(self._count(arrived_ns))
        return verdict.result()

    def _count(self, now: int) -> tuple[bool, int]:
        """Decide on an arrival; a refused request uses up nothing of any counter."""
        self.tally.arrivals.append(now)
        after = copy.deepcopy(self._counters)
        verdicts = {name: counter.admit(now / 1e9) for name, counter in after.items()}
        self.tally.refused_by.update(name for name, verdict in verdicts.items() if not verdict.admitted)
        admitted = all(verdict.admitted for verdict in verdicts.values())
        if admitted:
            self._counters = after
        (self.tally.admitted if admitted else self.tally.refused_at).append(now)
        return admitted, max(0, min(verdict.remaining for verdict in verdicts.values()))

    def _reply(self, admitted: bool, remaining: int) -> bytes:
        status, body = ("200 OK", BODY) if admitted else ("429 Too Many Requests", REFUSAL)
        head = (
            f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            f"X-RateLimit-Limit: {self.settings.limit}\r\nX-RateLimit-Remaining: {remaining}\r\n\r\n"
        )
        return head.encode() + body


class _Connection(asyncio.Protocol):
    """As much HTTP/1.1 as a client that posts forms one after the other needs; a request begins with its first byte."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._buffer = b""
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._respond(time.monotonic_ns()))
        self._buffer += data

    async def _respond(self, began_ns: int) -> None:
        answer = await self._service.answer(began_ns)  # a whole request has come long before
        head, _, rest = self._buffer.partition(b"\r\n\r\n")
        lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        self._buffer = rest[int(lengths[0].split(b":")[1]) :]
        self._task = None
        if not self._transport.is_closing():
            self._transport.write(answer)


def run_service(settings: ServiceSettings, control: Connection, parent: int) -> None:
    """Entry point of the process: sends its port, then its `Tally` so far whenever something is received."""
    end_with_parent(parent, 0.0)
    asyncio.run(_serve(settings, control))


async def _serve(settings: ServiceSettings, control: Connection) -> None:
    service = Service(settings)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Connection(service), "127.0.0.1", 0)
    control.send(server.sockets[0].getsockname()[1])
    while await asyncio.to_thread(control.recv) != "stop":
        control.send(service.tally)
