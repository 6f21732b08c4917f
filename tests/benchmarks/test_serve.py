"""What the serving benchmark counts."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks.serve import Waits, ask_all, ratio, shown
from common.tasks import Row

ROWS = [Row(id=str(number), text=f"request {number}") for number in range(40)]


async def test_every_row_is_asked_once_by_so_many_clients_and_what_fails_is_lost() -> None:
    asked: list[str] = []
    under_way = most = 0

    async def ask(row: Row) -> bool:
        nonlocal under_way, most
        asked.append(row.id)
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.001)
        under_way -= 1
        if row.id == "7":
            raise TimeoutError
        return row.id != "8"

    waits = Waits()
    await ask_all(ask, ROWS, 5, waits)
    assert sorted(asked, key=int) == [row.id for row in ROWS]
    assert most == 5
    assert (waits.lost, waits.valid, len(waits.seconds)) == (1, 38, 39)
    assert min(waits.seconds) >= 0.001
    assert len(waits.rates) == 1


def test_figures() -> None:
    ours = Waits(seconds=[number / 100 for number in range(1, 101)], rates=[10.0, 30.0, 20.0])
    assert ratio(ours, Waits(rates=[20.0, 30.0, 25.0])) == 0.8
    found = shown(ours)
    assert found["per_s"] == 20.0
    assert found["p50_s"] == pytest.approx(0.505, abs=0.01)
    assert found["p99_s"] == pytest.approx(1.0, abs=0.02)
