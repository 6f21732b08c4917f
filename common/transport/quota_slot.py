"""A rewarder's side of the fleet's quota: the wait for a slot, and the slot in its hands (see `common.quota`)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from common import messages as m


class QuotaSlot:
    """Permission for one upstream request, to be sent at once.

    age_s: how long ago it was granted, at most.
    """

    def __init__(self, grant: m.SlotGrant, send: Callable[[m.ToBroker], None], age_s: float = 0.0) -> None:
        self._grant = grant
        self._send = send
        self._age_s = age_s
        self._taken_at = time.monotonic()
        self._given_back = False

    @property
    def number(self) -> int:
        """Of the slot, from 0."""
        return self._grant.slot

    def sent(self) -> None:
        """The request is about to be written. Where this is not called, it was when the slot was had."""
        now = time.monotonic()
        self._age_s += now - self._taken_at
        self._taken_at = now

    def replied(self, limit: int | None = None, remaining: int | None = None) -> None:
        """The upstream's answer has begun to arrive: the slot cools down from now on. Counts once.

        limit, remaining: its X-RateLimit headers.
        """
        took_s = time.monotonic() - self._taken_at
        self._give_back(m.SlotReplied(self._grant.slot, self._grant.grant, limit, remaining, self._age_s, took_s))

    def throttled(self, retry_after_s: float, refused: bool = True) -> None:
        """The upstream asks to be left alone: tell the whole fleet. refused: it turned the request away."""
        self._send(m.SlotThrottled(min(max(retry_after_s, 0.0), m.MAX_RETRY_AFTER_S), refused))

    def unused(self) -> None:
        """Nothing was sent under this slot, and nothing will be."""
        self._give_back(m.SlotReplied(self._grant.slot, self._grant.grant, unused=True))

    def _give_back(self, message: m.SlotReplied) -> None:
        if not self._given_back:
            self._given_back = True
            self._send(message)


@dataclass
class SlotWaiter:
    """Somebody who waits for a slot: asked under `number` at `asked_at` (monotonic seconds)."""

    number: int
    asked_at: float
    granted: asyncio.Future[m.SlotGrant]
