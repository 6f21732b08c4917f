"""A circuit breaker as a pure state machine (Nygard, "Release It!", 2007): an upstream that fails is left alone.

    closed ──`failures` in a row──► open ──after `pause_s`──► half-open ──its one probe succeeds──► closed
                                     ▲                            │
                                     └────────the probe fails─────┘

Holds no clock: times come in as arguments, in seconds of one monotonic clock.

Invariants: nothing passes while it is open; in half-open one request is under way at most; results of requests that
began before it opened do not close it.
"""

from __future__ import annotations

from typing import Literal

State = Literal["closed", "open", "half-open"]


class Breaker:
    """Opens after `failures` failures in a row, for `pause_s` seconds."""

    def __init__(self, failures: int, pause_s: float) -> None:
        if failures < 1 or pause_s <= 0:
            raise ValueError(f"a breaker needs failures >= 1 and pause_s > 0, got {failures} and {pause_s:g}")
        self.state: State = "closed"
        self.opened = 0  # times
        self._failures = failures
        self._pause_s = pause_s
        self._in_a_row = 0
        self._retry_at = float("-inf")
        self._round = 0  # counts changes of state, so that late results are known as such
        self._probing = False

    def begin(self, now: float) -> int | None:
        """Ask to send one request. Returns a number to report its result under; None if it must not be sent."""
        if self.state == "open" and now >= self._retry_at:
            self._change("half-open")
        if self.state == "open" or self._probing:
            return None
        self._probing = self.state == "half-open"
        return self._round

    def retry_after_s(self, now: float) -> float:
        """Seconds until it is worth asking again; while a probe is under way, one more pause."""
        return max(0.0, self._retry_at - now) if self.state == "open" else self._pause_s

    def stands(self, number: int) -> bool:
        """Whether a request that was let through under `number` would still be let through."""
        return number == self._round

    def succeeded(self, number: int) -> None:
        """The upstream answered, whatever it thought of the query."""
        if number == self._round:
            self._in_a_row = 0
            if self.state == "half-open":
                self._change("closed")

    def failed(self, number: int, now: float, pause_s: float | None = None) -> None:
        """The upstream did not answer usably. pause_s: how long it asked to be left alone."""
        if number != self._round:
            return
        self._in_a_row += 1
        if self.state == "half-open" or self._in_a_row >= self._failures:
            self._retry_at = now + max(self._pause_s, pause_s or 0.0)
            self.opened += 1
            self._change("open")

    def abandoned(self, number: int) -> None:
        """The request ended without telling anything of the upstream (cancelled, throttled): the next may probe."""
        if number == self._round:
            self._probing = False

    def _change(self, state: State) -> None:
        self.state = state
        self._round += 1
        self._in_a_row = 0
        self._probing = False
