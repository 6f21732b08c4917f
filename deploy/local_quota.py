"""The quota of a command that searches in this process alone: the broker's own machine, without a broker."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from common import messages as m
from common.adaptive_quota import AdaptivePool
from common.broker.quota_desk import QuotaDesk
from common.config import Config
from common.quota import USE_GRANT_WITHIN_S, SlotPool
from common.transport.quota_slot import QuotaSlot
from deploy.engines import slots_of
from deploy.roles import off_peak_hours
from rewarders.engines.permits import Permit

_PEER = "this process"
_HOURS_CHECK_S = 30.0


def local_permit(config: Config) -> Permit | None:
    """What is entered around every request of this process; None where there is no quota."""
    return None if config.search.quota is None else LocalQuota(config).permit


class LocalQuota:
    """Grants slots of `search.quota` to requests of this event loop; enter `permit()` around each.

    Nobody knows what a process before this one has sent, so the first slot is granted only when that is answered for
    sure: the deadline of a request and a window after the start.

    config: has a `search.quota`.
    """

    def __init__(self, config: Config) -> None:
        quota = config.search.quota
        assert quota is not None
        kind = AdaptivePool if quota.mode == "adaptive" else SlotPool
        deadline_s = config.search.timeout_s + USE_GRANT_WITHIN_S
        self._desk = QuotaDesk(kind(slots_of(config), quota.window_s, deadline_s, now=time.monotonic()))
        self._off_peak = quota.off_peak
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[m.SlotGrant]] = {}
        self._timer: asyncio.TimerHandle | None = None

    @asynccontextmanager
    async def permit(self) -> AsyncIterator[QuotaSlot]:
        """Hold one slot around one request upstream (see `common.quota`)."""
        while (slot := await self._acquire()) is None:
            pass
        yield slot

    async def _acquire(self) -> QuotaSlot | None:
        """A slot; None where it was granted too long ago to be used safely: it is given back."""
        await self._wait_for_hours()
        number = next(self._numbers)
        granted: asyncio.Future[m.SlotGrant] = asyncio.get_running_loop().create_future()
        self._waiting[number] = granted
        asked_at = time.monotonic()
        self._apply(m.SlotRequest(number))
        try:
            grant = await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled():
                QuotaSlot(granted.result(), self._apply).unused()
            raise
        finally:
            self._waiting.pop(number, None)
        age_s = max(0.0, time.monotonic() - asked_at - grant.waited_s)
        slot = QuotaSlot(grant, self._apply, age_s)
        if age_s < grant.use_within_s:
            return slot
        slot.unused()
        return None

    async def _wait_for_hours(self) -> None:
        while self._off_peak and (closed_s := off_peak_hours()[0]) > 0:
            await asyncio.sleep(min(closed_s, _HOURS_CHECK_S))

    def _apply(self, message: m.ToBroker) -> None:
        assert isinstance(message, m.SlotRequest | m.SlotReplied | m.SlotThrottled)
        self._desk.heard(_PEER)
        self._desk.handle(_PEER, message, time.monotonic())
        self._grant()

    def _grant(self) -> None:
        now = time.monotonic()
        for _, grant in self._desk.outgoing(now):
            waiting = self._waiting.pop(grant.request, None)
            if waiting is None or waiting.done():
                self._desk.undelivered(grant, now)
            else:
                waiting.set_result(grant)
        if self._timer is not None:
            self._timer.cancel()
        due = self._desk.next_event()
        self._timer = None if due is None else asyncio.get_running_loop().call_later(max(0.0, due - now), self._grant)
