"""The quota of one process: never more than N arrivals in any window, cancelled requests included."""

from __future__ import annotations

import asyncio
import time

import pytest

from common.config import Config, load_config
from deploy.local_quota import LocalQuota

SLOTS, WINDOW_S, TIMEOUT_S = 3, 0.15, 0.1


def config(mode: str = "strict") -> Config:
    quota = f"search.quota={{requests: {SLOTS}, window_s: {WINDOW_S}, mode: {mode}}}"
    return load_config(None, [quota, f"search.timeout_s={TIMEOUT_S}"])


@pytest.mark.parametrize("mode", ["strict", "adaptive"])
async def test_no_window_holds_more_than_is_allowed(mode: str) -> None:
    began = time.monotonic()
    quota = LocalQuota(config(mode))
    arrivals: list[float] = []

    async def request() -> None:
        async with quota.permit() as slot:
            slot.sent()
            await asyncio.sleep(0.005)
            arrivals.append(time.monotonic())
            slot.replied()

    await asyncio.gather(*(request() for _ in range(5 * SLOTS)))
    assert len(arrivals) == 5 * SLOTS
    arrivals.sort()
    spans = [later - earlier for earlier, later in zip(arrivals, arrivals[SLOTS:], strict=False)]
    assert min(spans) >= WINDOW_S
    assert arrivals[0] - began >= TIMEOUT_S + WINDOW_S, "what an earlier process sent may still be counted"


async def test_who_gives_up_takes_no_slot_along() -> None:
    quota = LocalQuota(config())

    async def request() -> None:
        async with quota.permit() as slot:
            slot.unused()

    impatient = [asyncio.create_task(request()) for _ in range(20)]
    await asyncio.sleep(0)
    for task in impatient:
        task.cancel()
    assert all(
        isinstance(end, asyncio.CancelledError) for end in await asyncio.gather(*impatient, return_exceptions=True)
    )
    async with asyncio.timeout(30):
        await asyncio.gather(*(request() for _ in range(SLOTS)))


async def test_a_service_that_asks_for_a_pause_gets_it() -> None:
    quota = LocalQuota(config())
    async with quota.permit() as slot:
        slot.replied()
        slot.throttled(0.4)
    told = time.monotonic()
    async with quota.permit() as slot:
        assert time.monotonic() - told >= 0.4
        slot.replied()
