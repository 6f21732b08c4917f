"""A fleet, a network and a service in virtual time, for the tests of the quota's state machines."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from common.quota import NO_NEWS, Reply, SlotPool
from rewarders.servers.quota import FixedWindow, Gcra, SlidingLog, Verdict

COUNTERS: dict[str, Callable[[int, float], Counter]] = {
    "fixed": lambda limit, window_s: FixedWindow(limit, window_s, phase_s=0.37 * window_s),
    "sliding": SlidingLog,
    "gcra": Gcra,
}


class Counter(Protocol):
    def admit(self, now: float) -> Verdict: ...


@dataclass
class Network:
    """Seconds to the service, of its work, and back; `lost`: share of answers that never reach the broker."""

    there: Callable[[random.Random], float] = lambda rng: 0.02 + rng.expovariate(1 / 0.002)
    work: Callable[[random.Random], float] = lambda rng: 0.15 + rng.lognormvariate(-2.7, 0.8)
    back: Callable[[random.Random], float] = lambda rng: 0.02 + rng.expovariate(1 / 0.002)
    lost: float = 0.0
    stalls: float = 0.0
    headers: bool = True


@dataclass
class World:
    """Workers that always want a slot. `run` plays a number of virtual seconds."""

    pool: SlotPool
    counter: Counter
    limit: int
    network: Network = field(default_factory=Network)
    workers: int = 4
    seed: int = 0
    foreign_per_s: float = 0.0
    now: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    round_trips: list[float] = field(default_factory=list)
    refused: int = 0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self._numbers = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        if self.foreign_per_s:
            self._at(self.rng.expovariate(self.foreign_per_s), self._foreign)

    def run(self, seconds: float) -> World:
        end = self.now + seconds
        while True:
            while self.pool.waiting < 2 * self.workers:
                number = next(self._numbers)
                self.pool.request(f"w{number % self.workers}", number, self.now)
            for grant in self.pool.grant(self.now):
                self._send(grant.slot, grant.grant)
            due = [self._events[0][0]] if self._events else []
            event = self.pool.next_event()
            upcoming = min([*due, *([] if event is None else [event])], default=end)
            if upcoming >= end:
                self.now = end
                return self
            self.now = max(self.now, upcoming)
            while self._events and self._events[0][0] <= self.now:
                heapq.heappop(self._events)[2]()

    def _at(self, time: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time, next(self._numbers), action))

    def _send(self, slot: int, grant: int) -> None:
        sent, network, rng = self.now, self.network, self.rng
        self._at(sent + network.there(rng), lambda: self._arrive(slot, grant, sent))

    def _arrive(self, slot: int, grant: int, sent: float) -> None:
        verdict = self.counter.admit(self.now)
        self.arrivals.append(self.now)
        self.refused += not verdict.admitted
        if self.rng.random() < self.network.lost:
            return
        work = self.network.work(self.rng) if verdict.admitted else 0.001
        if self.rng.random() < self.network.stalls:
            work += self.rng.uniform(0.3, 1.5)
        self._at(self.now + work + self.network.back(self.rng), lambda: self._answer(slot, grant, sent, verdict))

    def _answer(self, slot: int, grant: int, sent: float, verdict: Verdict) -> None:
        took_s = self.now - sent
        self.round_trips.append(took_s)
        reply = Reply(self.limit, max(0, verdict.remaining), 0.0, took_s) if self.network.headers else NO_NEWS
        self.pool.replied(slot, grant, self.now, reply)
        if not verdict.admitted:
            self.pool.throttled(2.0, self.now)

    def _foreign(self) -> None:
        """Somebody else with the same key."""
        self.counter.admit(self.now)
        self._at(self.now + self.rng.expovariate(self.foreign_per_s), self._foreign)


def most_in_any_window(arrivals: list[float], window_s: float) -> int:
    """The most arrivals in any half-open window: it begins at an arrival."""
    arrivals = sorted(arrivals)
    first, most = 0, 0
    for last, time in enumerate(arrivals):
        while arrivals[first] <= time - window_s:
            first += 1
        most = max(most, last - first + 1)
    return most
