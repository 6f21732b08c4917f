"""Results that a fleet shares, and who fetches what at the moment, as a pure state machine.

Keys and results are opaque bytes. Whoever asks for a key is given its result, or told to fetch it (a promise that ends
at a deadline unless it is renewed), or told to wait for whoever was told to fetch it.

Invariants, after every call:

1. A key is kept, in flight, or neither; never both.
2. A key in flight has exactly one fetcher, with a deadline. So nobody waits for ever: at the deadline, or when the
   fetcher fails or leaves, the next one who waits becomes the fetcher, and with the last one the flight ends.
3. What is kept is at most `max_bytes` and `max_entries`, the least recently used goes first; at most `max_asking`
   peers' questions are in flight, at most `max_asking_each` of one peer. Who asks beyond that fetches alone.

Times are seconds on any clock that never goes back. Cost: O(1) per event and waiter.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

ENTRY_BYTES = 200  # of memory, beside key and payload


class Told(Enum):
    """What one does who asked for a result that is not there."""

    FETCH = "fetch"
    WAIT = "wait"
    ALONE = "alone"  # fetch, but nobody will wait for it


class Promoted(NamedTuple):
    """`peer`, who waited for `key`, is to fetch it."""

    peer: str
    key: bytes


@dataclass(slots=True)
class _Flight:
    fetcher: str
    deadline: float
    waiters: OrderedDict[str, None] = field(default_factory=OrderedDict)


class SharedCache:
    """Payloads by key, and flights.

    Args:
        promise_s: seconds within which a fetcher delivers, fails or renews its promise.
        max_bytes, max_entries: of what is kept; 0 bytes keeps nothing, flights are shared still.
    """

    def __init__(
        self,
        promise_s: float,
        max_bytes: int,
        max_entries: int = 1 << 18,
        max_asking: int = 1 << 16,
        max_asking_each: int = 4096,
    ) -> None:
        self.promise_s = promise_s
        self.bytes = 0
        self.hits = 0
        self.waited = 0
        self._max_bytes = max_bytes
        self._max_entries = max_entries
        self._max_asking = max_asking
        self._max_asking_each = max_asking_each
        self._kept: OrderedDict[bytes, bytes] = OrderedDict()
        self._flights: OrderedDict[bytes, _Flight] = OrderedDict()  # the earliest deadline first
        self._asking_of: dict[str, set[bytes]] = {}
        self._asking = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def in_flight(self) -> int:
        """Keys that somebody is fetching."""
        return len(self._flights)

    @property
    def asking(self) -> int:
        """Fetchers and waiters, counted once per key."""
        return self._asking

    def get(self, key: bytes, peer: str, now: float) -> bytes | Told:
        """A peer wants a result. Asking again changes nothing but a fetcher's deadline."""
        payload = self._kept.get(key)
        if payload is not None:
            self._kept.move_to_end(key)
            self.hits += 1
            return payload
        flight = self._flights.get(key)
        if flight is not None and flight.fetcher == peer:
            self.renew(key, peer, now)
            return Told.FETCH
        if flight is not None and peer in flight.waiters:
            return Told.WAIT
        if self._asking >= self._max_asking or len(self._asking_of.get(peer, ())) >= self._max_asking_each:
            return Told.ALONE
        self._asking += 1
        self._asking_of.setdefault(peer, set()).add(key)
        if flight is None:
            self._flights[key] = _Flight(peer, now + self.promise_s)
            return Told.FETCH
        flight.waiters[peer] = None
        self.waited += 1
        return Told.WAIT

    def put(self, key: bytes, payload: bytes, peer: str) -> list[str]:
        """A peer has a result: keep it, end the flight. Returns who else waited and is to be given it."""
        flight = self._flights.pop(key, None)
        waiters: list[str] = []
        if flight is not None:
            waiters = [waiter for waiter in flight.waiters if waiter != peer]
            for asking in (flight.fetcher, *flight.waiters):
                self._asks_no_more(asking, key)
        self._keep(key, payload)
        return waiters

    def renew(self, key: bytes, peer: str, now: float) -> None:
        """The fetcher is still at it."""
        flight = self._flights.get(key)
        if flight is not None and flight.fetcher == peer:
            flight.deadline = now + self.promise_s
            self._flights.move_to_end(key)

    def failed(self, key: bytes, peer: str, now: float) -> list[Promoted]:
        """A peer will not deliver, or no longer waits. Returns who is to fetch instead, if anybody."""
        flight = self._flights.get(key)
        if flight is None or key not in self._asking_of.get(peer, ()):
            return []
        self._asks_no_more(peer, key)
        if flight.fetcher != peer:
            del flight.waiters[peer]
            return []
        return self._next_fetcher(key, flight, now)

    def leave(self, peer: str, now: float) -> list[Promoted]:
        """A peer is gone. Returns who is to fetch what it was fetching."""
        return [promoted for key in sorted(self._asking_of.get(peer, ())) for promoted in self.failed(key, peer, now)]

    def expire(self, now: float) -> list[Promoted]:
        """Fetchers whose deadline has come are not waited for. Returns who is to fetch instead."""
        promoted: list[Promoted] = []
        while self._flights:
            key, flight = next(iter(self._flights.items()))
            if flight.deadline > now:
                break
            promoted += self.failed(key, flight.fetcher, now)
        return promoted

    def next_event(self) -> float | None:
        """When `expire` has something to do."""
        return next(iter(self._flights.values())).deadline if self._flights else None

    def _next_fetcher(self, key: bytes, flight: _Flight, now: float) -> list[Promoted]:
        if not flight.waiters:
            del self._flights[key]
            return []
        flight.fetcher, _ = flight.waiters.popitem(last=False)
        self.renew(key, flight.fetcher, now)
        return [Promoted(flight.fetcher, key)]

    def _asks_no_more(self, peer: str, key: bytes) -> None:
        keys = self._asking_of[peer]
        keys.remove(key)
        if not keys:
            del self._asking_of[peer]
        self._asking -= 1

    def _keep(self, key: bytes, payload: bytes) -> None:
        replaced = self._kept.pop(key, None)
        if replaced is not None:
            self.bytes -= _size(key, replaced)
        self._kept[key] = payload
        self.bytes += _size(key, payload)
        while self._kept and (self.bytes > self._max_bytes or len(self._kept) > self._max_entries):
            evicted, old = self._kept.popitem(last=False)
            self.bytes -= _size(evicted, old)


def _size(key: bytes, payload: bytes) -> int:
    return len(key) + len(payload) + ENTRY_BYTES
