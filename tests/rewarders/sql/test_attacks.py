from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import psutil
import pytest

from common.sql.table import Table
from rewarders.sql.errors import SqlRefused, SqlTimeout, SqlUnavailable
from rewarders.sql.limits import SqlLimits
from rewarders.sql.pool import SqlPool
from tests.rewarders.sql.attacks import BOMBS, DUDS, ESCAPES, MALFORMED, WRITES
from tests.rewarders.sql.conftest import LIMITS

DEADLINE_S = 0.5
LATEST_S = DEADLINE_S + 0.5


class Watch:
    """What the pool's workers were seen with while the watch ran: largest resident memory in bytes, working folders,
    files open for writing.
    """

    def __init__(self, pool: SqlPool) -> None:
        self.pool = pool
        self.peak = 0
        self.folders = {"/"}  # where workers are started
        self.writing: set[str] = set()

    def look(self) -> None:
        for pid in self.pool.pids:
            # Only root may look into a worker's folder and files, because it is not dumpable.
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                worker = psutil.Process(pid)
                self.peak = max(self.peak, worker.memory_info().rss)
                self.folders.add(worker.cwd())
                self.writing |= {file.path for file in worker.open_files() if getattr(file, "mode", "r") != "r"}

    async def run(self) -> None:
        while True:
            self.look()
            await asyncio.sleep(0.005)


def stray_files(folders: Iterable[str]) -> set[str]:
    """All there is in the working folders of workers, and what SQLite or an attack could leave where temporary files
    go. Those folders are everybody's, so that other names there say nothing.
    """
    seen = {entry.path for folder in folders for entry in os.scandir(folder)}
    places = {tempfile.gettempdir(), "/tmp", "/var/tmp", "/usr/tmp"}
    return seen | {
        entry.path
        for place in places
        if os.path.isdir(place)
        for entry in os.scandir(place)
        if entry.name.startswith(("etilqs_", "new.sqlite"))
    }


def files(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


async def ask(pool: SqlPool, database: Path, sql: str) -> Table | SqlRefused | SqlTimeout:
    """Run a query against the clock; ask again, as a rewarder does, if the machine was too busy to tell."""
    for _ in range(20):
        started = time.perf_counter()
        try:
            return await pool.run(database, sql, DEADLINE_S)
        except (SqlRefused, SqlTimeout) as error:
            return error
        except SqlUnavailable as error:
            if "stalled" not in error.reason:
                raise
        finally:
            took = time.perf_counter() - started
            assert took <= LATEST_S
    if os.getloadavg()[0] < len(os.sched_getaffinity(0)) + 0.5:
        pytest.fail("the worker stalls, and the machine has nothing else to do")
    pytest.skip("this machine gives the worker no processor time")


async def attack(pool: SqlPool, database: Path, sql: str) -> Table | SqlRefused | SqlTimeout:
    """Run an attack, check everything that must hold whatever it was, and return how it ended."""
    watch = Watch(pool)
    watch.look()
    before, strays = files(database.parent), stray_files(watch.folders)
    watching = asyncio.ensure_future(watch.run())
    outcome = await ask(pool, database, sql)
    watching.cancel()
    assert files(database.parent) == before
    assert stray_files(watch.folders) <= strays
    assert watch.writing == set()
    # The pool goes on, and nothing of the attack is left in it.
    assert (await pool.run(database, "SELECT name FROM adults ORDER BY name")).rows == (("Ada",), ("Çelik",))
    with pytest.raises(SqlRefused, match="no such table"):
        await pool.run(database, "SELECT * FROM t")
    watch.look()
    assert 0 < watch.peak < LIMITS.memory_mb << 20
    if isinstance(outcome, SqlRefused | SqlTimeout):
        assert "\n" not in outcome.reason
        assert 0 < len(outcome.reason) <= 400
    return outcome


def filled(sql: str, database: Path) -> str:
    return sql.replace("{new}", str(database.parent / "new.sqlite"))


@pytest.mark.parametrize("name", WRITES)
async def test_nothing_is_written(pool: SqlPool, database: Path, name: str) -> None:
    outcome = await attack(pool, database, filled(WRITES[name], database))
    assert isinstance(outcome, SqlRefused)


@pytest.mark.parametrize("name", ESCAPES)
async def test_nothing_else_is_reached(pool: SqlPool, database: Path, name: str) -> None:
    assert isinstance(await attack(pool, database, filled(ESCAPES[name], database)), SqlRefused)
    assert pool.stats.restarts == 0


@pytest.mark.parametrize("name", BOMBS)
async def test_a_bomb_ends_in_time_and_in_little_memory(pool: SqlPool, database: Path, name: str) -> None:
    assert isinstance(await attack(pool, database, BOMBS[name]), SqlRefused | SqlTimeout)


@pytest.mark.parametrize("name", DUDS)
async def test_a_dud_is_answered(pool: SqlPool, database: Path, name: str) -> None:
    await attack(pool, database, DUDS[name])
    assert pool.stats.restarts == 0


@pytest.mark.parametrize("name", MALFORMED)
async def test_what_is_no_query_is_refused(pool: SqlPool, database: Path, name: str) -> None:
    assert isinstance(await attack(pool, database, MALFORMED[name]), SqlRefused)
    assert pool.stats.restarts == 0


async def test_endless_rows_come_back_truncated(pool: SqlPool, database: Path) -> None:
    sql = "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT n FROM r"
    outcome = await attack(pool, database, sql)
    assert isinstance(outcome, Table)
    assert outcome.truncated
    assert outcome.rows[:3] == ((1,), (2,), (3,))
    assert len(outcome.rows) <= 100


async def test_large_cells_come_back_truncated(pool: SqlPool, database: Path) -> None:
    outcome = await attack(pool, database, "SELECT n, printf('%.*c', 900000, 'x') FROM numbers")
    assert isinstance(outcome, Table)
    assert outcome.truncated
    assert outcome.size_bytes() <= LIMITS.max_bytes


async def test_a_hungry_query_meets_the_limit_of_sqlite_first(database: Path) -> None:
    """SQLite's own limit, far below that of the process: the query is refused and its worker lives."""
    limits = SqlLimits(heap_mb=8, memory_mb=1024)
    async with SqlPool(workers=1, limits=limits, folders=[database.parent]) as pool:
        watch = Watch(pool)
        watching = asyncio.ensure_future(watch.run())
        with pytest.raises(SqlRefused, match="memory"):
            await pool.run(
                database, "SELECT count(*) FROM (SELECT DISTINCT a.n, b.n, c.n FROM numbers a, numbers b, numbers c)"
            )
        watching.cancel()
        assert pool.stats.restarts == 0
        assert 0 < watch.peak < 64 << 20


async def test_the_schema_is_no_secret(pool: SqlPool, database: Path) -> None:
    outcome = await attack(pool, database, "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")
    assert isinstance(outcome, Table)
    assert outcome.rows == (("numbers",), ("people",))


async def test_bombs_in_every_worker_leave_the_others_their_answers(database: Path) -> None:
    """More bombs than workers, at once with honest queries: every one ends as it should, and memory stays bounded."""
    bombs = [BOMBS[name] for name in ("printf_precision", "endless_count", "cross_join_sort", "doubling_text")]
    async with SqlPool(workers=2, limits=LIMITS, folders=[database.parent]) as pool:
        watch = Watch(pool)
        watching = asyncio.ensure_future(watch.run())
        honest = [pool.run(database, f"SELECT count(*) + {n} FROM people") for n in range(20)]
        hostile = [pool.run(database, sql, DEADLINE_S) for sql in bombs]
        outcomes = await asyncio.gather(*hostile, *honest, return_exceptions=True)
        watching.cancel()
        # The busy machine may leave a bomb undecided, but it never pays for one.
        assert all(isinstance(outcome, SqlTimeout | SqlRefused | SqlUnavailable) for outcome in outcomes[:4])
        assert [outcome.rows for outcome in outcomes[4:] if isinstance(outcome, Table)] == [
            ((4 + n,),) for n in range(20)
        ]
        assert watch.peak < LIMITS.memory_mb << 20
