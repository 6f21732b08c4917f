"""Permits that note what happens around requests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from rewarders.engines.permits import Permit, Slot
from tests.rewarders.fake_upstream import FakeUpstream


class Recorder:
    """A slot that notes what it is told."""

    number = 0

    def __init__(self, events: list[str]) -> None:
        self._events = events

    def sent(self) -> None: ...

    def replied(self, limit: int | None = None, remaining: int | None = None) -> None:
        self._events.append("replied")

    def throttled(self, retry_after_s: float, refused: bool = True) -> None:
        self._events.append("throttled")

    def unused(self) -> None:
        self._events.append("unused")


def recording(upstream: FakeUpstream, events: list[str]) -> Permit:
    """A permit that is given at once."""

    @asynccontextmanager
    async def permit() -> AsyncIterator[Slot]:
        events.append(f"granted before request {len(upstream.received) + 1}")
        yield Recorder(events)
        events.append("released")

    return permit


def requests_under_permits(count: int) -> list[str]:
    """The events of `count` requests, each under a permit of its own."""
    return [event for n in range(1, count + 1) for event in (f"granted before request {n}", "replied", "released")]
