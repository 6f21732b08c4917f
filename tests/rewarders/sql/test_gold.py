from __future__ import annotations

import asyncio
import sqlite3
from collections import Counter
from pathlib import Path

import pytest

from common.sql.comparators import equal
from common.sql.table import Table
from rewarders.sql.errors import GoldUnusable, SqlRefused, SqlTimeout, SqlUnavailable
from rewarders.sql.gold import GoldResults
from rewarders.sql.pool import SqlPool

ENDLESS = "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT n FROM r WHERE n < 0"


class CountingPool(SqlPool):
    """A real pool that counts what it is asked, and fails with `failure` while that is set."""

    def __init__(self) -> None:
        super().__init__(workers=1)
        self.asked: Counter[str] = Counter()
        self.failure: Exception | None = None

    async def run(self, database: Path, sql: str, deadline_s: float | None = None) -> Table:
        self.asked[sql] += 1
        if self.failure is not None:
            raise self.failure
        return await super().run(database, sql, deadline_s)


async def test_a_gold_query_runs_once(database: Path) -> None:
    async with CountingPool() as pool:
        golds = GoldResults(pool)
        tables = await asyncio.gather(*(golds.get(database, "SELECT count(*) FROM people") for _ in range(8)))
        tables.append(await golds.get(database, "SELECT count(*) FROM people"))
        assert {table.rows for table in tables} == {((4,),)}
        assert pool.asked == {"SELECT count(*) FROM people": 1}
        assert len(golds) == 1


async def test_a_changed_file_is_another_database(database: Path) -> None:
    async with CountingPool() as pool:
        golds = GoldResults(pool)
        assert (await golds.get(database, "SELECT count(*) FROM people")).rows == ((4,),)
        connection = sqlite3.connect(database)
        connection.execute("DELETE FROM people WHERE id = 1")
        connection.commit()
        connection.close()
        assert (await golds.get(database, "SELECT count(*) FROM people")).rows == ((3,),)


async def test_a_gold_query_that_is_too_slow_is_no_empty_table(database: Path) -> None:
    """The fault of the original: its timeout is an empty list, which every empty prediction equals."""
    now = 0.0
    async with CountingPool() as pool:
        golds = GoldResults(pool, deadline_s=0.3, retry_s=60.0, clock=lambda: now)
        with pytest.raises(SqlUnavailable):
            await golds.get(database, ENDLESS)
        empty = await pool.run(database, "SELECT n FROM numbers WHERE n < 0")
        assert equal("bird", empty, empty, ENDLESS)

        pool.failure = SqlTimeout("the query ran longer than 0.3 s")
        for _ in range(5):
            with pytest.raises(SqlUnavailable, match="too slow"):
                await golds.get(database, "SELECT 1")
        assert pool.asked["SELECT 1"] == 1
        pool.failure = None
        now = 61.0
        assert (await golds.get(database, "SELECT 1")).rows == ((1,),)


async def test_an_outage_is_asked_again(database: Path) -> None:
    async with CountingPool() as pool:
        golds = GoldResults(pool)
        pool.failure = SqlUnavailable("down")
        for _ in range(2):
            with pytest.raises(SqlUnavailable, match="down") as raised:
                await golds.get(database, "SELECT 1")
            assert not isinstance(raised.value, GoldUnusable)
        pool.failure = None
        assert (await golds.get(database, "SELECT 1")).rows == ((1,),)
        assert pool.asked["SELECT 1"] == 3


@pytest.mark.parametrize("sql", ["SELECT wages FROM people", "DELETE FROM people", "", "SELECT random()"])
async def test_a_refused_gold_query_never_blames_a_prediction(database: Path, sql: str) -> None:
    async with CountingPool() as pool:
        golds = GoldResults(pool)
        for _ in range(3):
            with pytest.raises(GoldUnusable, match="leave its question out"):
                await golds.get(database, sql)
        assert pool.asked[sql] == 1
        assert not issubclass(GoldUnusable, SqlRefused)


async def test_a_gold_result_is_whole_or_unusable(database: Path, pool: SqlPool) -> None:
    golds = GoldResults(pool)
    with pytest.raises(GoldUnusable, match="too much"):
        await golds.get(database, "SELECT a.n FROM numbers a, numbers b")


async def test_what_depends_on_the_clock_is_not_kept(database: Path) -> None:
    async with CountingPool() as pool:
        golds = GoldResults(pool)
        for _ in range(3):
            await golds.get(database, "SELECT date('now') > '2020'")
        assert pool.asked["SELECT date('now') > '2020'"] == 3
        assert len(golds) == 0


async def test_memory_is_bounded_by_entries_and_by_bytes(database: Path) -> None:
    async with CountingPool() as pool:
        golds = GoldResults(pool, max_entries=2)
        for sql in ("SELECT 1", "SELECT 2", "SELECT 1", "SELECT 3", "SELECT 1", "SELECT 2"):
            await golds.get(database, sql)
        assert pool.asked == {"SELECT 1": 1, "SELECT 2": 2, "SELECT 3": 1}
        assert len(golds) == 2
        small = GoldResults(pool, max_bytes=1000)
        await small.get(database, "SELECT n FROM numbers")
        assert len(small) == 0
        await small.get(database, "SELECT 1")
        assert len(small) == 1


async def test_a_caller_that_gives_up_leaves_the_others_their_answer(database: Path) -> None:
    async with CountingPool() as pool:
        golds = GoldResults(pool)
        callers = [asyncio.ensure_future(golds.get(database, "SELECT count(*) FROM numbers")) for _ in range(3)]
        await asyncio.sleep(0)
        callers[0].cancel()
        assert (await callers[1]).rows == (await callers[2]).rows == ((2000,),)
        assert callers[0].cancelled()
        assert sum(pool.asked.values()) == 1


async def test_closing_gives_up_what_runs(database: Path) -> None:
    async with CountingPool() as pool:
        golds = GoldResults(pool)
        caller = asyncio.ensure_future(golds.get(database, ENDLESS))
        await asyncio.sleep(0.05)
        await golds.close()
        with pytest.raises(SqlUnavailable, match="shutdown"):
            await caller


def test_negative_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        GoldResults(SqlPool(), max_entries=-1)
