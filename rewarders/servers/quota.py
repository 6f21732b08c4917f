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
