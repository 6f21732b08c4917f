"""The server's side of a request quota: at most N requests in any window of W seconds."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a request is admitted; `count` requests, this one included, came in the window ending now."""

    admitted: bool
    count: int
    remaining: int


@dataclass(slots=True)
class SlidingLog:
    """Admits a request if fewer than `limit` were admitted in the `window_s` seconds before it.

    Refused requests do not use up the quota, but are counted, as the `count` of NCBI's 429 body exceeds its
    limit by more than one when a client keeps hammering. Time comes in as an argument and must not run
    backwards.
    """

    limit: int
    window_s: float
    _admitted: deque[float] = field(default_factory=deque)
    _refused: deque[float] = field(default_factory=deque)

    def admit(self, now: float) -> Verdict:
        for log in (self._admitted, self._refused):
            while log and log[0] <= now - self.window_s:
                log.popleft()
        admitted = len(self._admitted) < self.limit
        (self._admitted if admitted else self._refused).append(now)
        count = len(self._admitted) + len(self._refused)
        return Verdict(admitted, count, self.limit - len(self._admitted))


@dataclass(slots=True)
class FixedWindow:
    """Admits `limit` requests between two multiples of `window_s`, shifted by `phase_s`. Refused ones do not count."""

    limit: int
    window_s: float
    phase_s: float = 0.0
    _number: int = 0
    _admitted: int = 0

    def admit(self, now: float) -> Verdict:
        number = int((now - self.phase_s) // self.window_s)
        if number != self._number:
            self._number, self._admitted = number, 0
        admitted = self._admitted < self.limit
        self._admitted += admitted
        return Verdict(admitted, self._admitted + (not admitted), self.limit - self._admitted)


@dataclass(slots=True)
class Gcra:
    """The generic cell rate algorithm (ITU-T I.371) with a burst of `limit`: each request moves the theoretical arrival
    time on by `window_s / limit`; one is refused that would move it more than `window_s` ahead.
    """

    limit: int
    window_s: float
    _theoretical: float = float("-inf")

    def admit(self, now: float) -> Verdict:
        step = self.window_s / self.limit
        start = max(self._theoretical, now)
        admitted = start + step <= now + self.window_s + 1e-9
        if admitted:
            self._theoretical = start + step
        remaining = int((self.window_s - max(0.0, self._theoretical - now)) / step + 1e-6)
        return Verdict(admitted, self.limit - remaining + (not admitted), remaining)
