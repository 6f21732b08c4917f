"""The gold queries of Spider and BIRD run in the jail as they run outside."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sqlite3
from pathlib import Path

import pytest

from common.sql.comparators import COMPARATORS, equal, prepare
from rewarders.sql.gatekeeper import FUNCTIONS
from rewarders.sql.gold import GoldResults
from rewarders.sql.pool import SqlPool
from tests.common.sql.spider_dev import NO_DATA, Databases, Gold, folder, questions
from tests.rewarders.sql.conftest import LIMITS

needs_spider = pytest.mark.skipif(folder() is None, reason=NO_DATA)
_ROOT = Path(os.environ.get("DEEPRETRIEVAL_DATA", "/nonexistent"))

CHINOOK = (
    "SELECT * FROM Invoice ORDER BY InvoiceDate DESC, InvoiceId LIMIT 50",
    "SELECT ar.Name, count(*) AS n, round(avg(t.Milliseconds) / 60000.0, 2) FROM Artist ar JOIN Album al "
    "USING (ArtistId) JOIN Track t USING (AlbumId) GROUP BY ar.ArtistId HAVING n > 10 ORDER BY n DESC, ar.Name",
    "SELECT BillingCountry, strftime('%Y', InvoiceDate) AS y, sum(Total) FROM Invoice GROUP BY 1, 2 ORDER BY 1, 2",
    "WITH RECURSIVE boss(id, level) AS (SELECT EmployeeId, 0 FROM Employee WHERE ReportsTo IS NULL UNION ALL "
    "SELECT e.EmployeeId, level + 1 FROM Employee e JOIN boss ON e.ReportsTo = boss.id) SELECT * FROM boss ORDER BY 1",
    "SELECT Name, Composer FROM Track WHERE Composer LIKE '%Jobim%' OR Name LIKE '%Ã%'",
    "SELECT Title, rank() OVER (PARTITION BY ArtistId ORDER BY Title) FROM Album ORDER BY ArtistId, 2",
)


def groups(golds: list[Gold], size: int) -> list[list[Gold]]:
    return [golds[start : start + size] for start in range(0, len(golds), size)]


@needs_spider
async def test_spider_runs_in_the_jail_as_outside() -> None:
    golds, outside = questions(), Databases()
    root = folder()
    assert root is not None
    async with SqlPool(workers=2, limits=LIMITS, folders=[root / "database"]) as pool:
        results = GoldResults(pool)
        for group in groups(golds, 100):
            jailed = await asyncio.gather(*(results.get(gold.database, gold.sql) for gold in group))
            for gold, table in zip(group, jailed, strict=True):
                assert table == outside.run(gold.database, gold.sql), gold.sql
                assert len(table.rows) == gold.rows
                assert all(equal(name, table, table, gold.sql) for name in COMPARATORS)
        assert pool.stats.restarts == 0
        distinct = [gold for gold in golds if prepare("spider", gold.sql) != gold.sql]
        tables = await asyncio.gather(*(results.get(gold.database, prepare("spider", gold.sql)) for gold in distinct))
        assert len(tables) > 50
    outside.close()


@pytest.mark.skipif(not (_ROOT / "chinook").is_dir(), reason="set DEEPRETRIEVAL_DATA to the folder with chinook/")
async def test_chinook_runs_in_the_jail_as_outside() -> None:
    database = _ROOT / "chinook" / "Chinook_Sqlite.sqlite"
    before = database.stat()
    outside = Databases()
    async with SqlPool(workers=1, folders=[database.parent]) as pool:
        for sql in CHINOOK:
            table = await pool.run(database, sql)
            assert table.rows
            assert table == outside.run(database, sql)
    outside.close()
    assert (database.stat().st_mtime_ns, database.stat().st_size) == (before.st_mtime_ns, before.st_size)


@pytest.mark.skipif(not (_ROOT / "deepretrieval_sql").is_dir(), reason="set DEEPRETRIEVAL_DATA to the folder of data")
def test_every_function_that_gold_queries_call_is_allowed() -> None:
    connection = sqlite3.connect(":memory:")
    builtin = {name for (name,) in connection.execute("SELECT name FROM pragma_function_list")}
    connection.close()
    called: set[str] = set()
    for path in (_ROOT / "deepretrieval_sql").glob("*.jsonl"):
        for line in path.read_text().splitlines():
            called.update(re.findall(r"\b([a-z_0-9]+) ?\(", json.loads(line)["sql"].lower()))
    used = called & builtin
    assert len(used) > 15
    assert used <= FUNCTIONS
