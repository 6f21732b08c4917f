from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import sqlite3
import sys
import time
from pathlib import Path

import psutil
import pytest

from rewarders.sql import worker_process
from rewarders.sql.errors import SqlRefused, SqlTimeout, SqlUnavailable
from rewarders.sql.limits import SqlLimits
from rewarders.sql.pool import SqlPool, database_uri
from tests.rewarders.sql.conftest import LIMITS, make_database

ENDLESS = "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT count(*) FROM r"
# Does its work inside one instruction, where only a kill ends it.
UNINTERRUPTIBLE = "SELECT printf('%.*c', 500000000, 'x')"


async def until_busy(pool: SqlPool) -> psutil.Process:
    """Wait until the pool's only worker computes, and return it."""
    (pid,) = pool.pids
    process = psutil.Process(pid)
    start = process.cpu_times().user
    while process.cpu_times().user < start + 0.05:
        await asyncio.sleep(0.01)
    return process


async def test_a_result_keeps_its_values_and_types(pool: SqlPool, database: Path) -> None:
    table = await pool.run(database, "SELECT * FROM people ORDER BY id")
    assert table.columns == ("id", "name", "age", "photo")
    assert table.rows == (
        (1, "Ada", 36.5, b"\x00\xff"),
        (2, "Bo", 17.0, None),
        (3, "Çelik", 40.0, b""),
        (4, None, None, None),
    )
    assert [type(cell) for cell in table.rows[2]] == [int, str, float, bytes]
    assert not table.truncated


@pytest.mark.parametrize(
    ("sql", "rows"),
    [
        ("SELECT name FROM people WHERE id = 9", ()),
        ("WITH x AS (SELECT 1 UNION SELECT 2) SELECT count(*) FROM x", ((2,),)),
        ("SELECT count(*) FROM (SELECT * FROM people)", ((4,),)),
        ("WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r WHERE n < 4) SELECT sum(n) FROM r", ((10,),)),
        ("SELECT value FROM json_each('[1, \"x\", null]')", ((1,), ("x",), (None,))),
        ("SELECT row_number() OVER (ORDER BY age DESC) FROM people WHERE age > 18", ((1,), (2,))),
        ("SELECT group_concat(name, '+') FROM (SELECT name FROM adults ORDER BY name)", (("Ada+Çelik",),)),
        ("SELECT strftime('%Y', '2020-05-17'), iif(1, 2, 3), round(2.345, 1), 'a' LIKE 'A'", (("2020", 2, 2.3, 1),)),
        ("SELECT -9223372036854775808, 9e999, 0.1", ((-(2**63), float("inf"), 0.1),)),
        ("SELECT cast(x'e4ff' AS TEXT)", (("\ufffd\ufffd",),)),
        ("; -- first\n SELECT 1 ; /* last */ ", ((1,),)),
        ("VALUES (1, 'a'), (2, 'b')", ((1, "a"), (2, "b"))),
        ("SELECT 1 FROM people WHERE name = 'a;b' -- ; DROP TABLE people", ()),
        ("SELECT datetime(0, 'unixepoch', 'localtime')", (("1970-01-01 00:00:00",),)),
    ],
)
async def test_honest_sql_runs(pool: SqlPool, database: Path, sql: str, rows: tuple[object, ...]) -> None:
    assert (await pool.run(database, sql)).rows == rows


async def test_schema_rows_are_readable_under_any_case(pool: SqlPool, database: Path) -> None:
    assert (await pool.run(database, "SELECT NAME FROM Main.PEOPLE WHERE ID = 1")).rows == (("Ada",),)


async def test_queries_leave_nothing_behind_for_each_other(pool: SqlPool, database: Path, tmp_path: Path) -> None:
    other = make_database(database.parent / "other.sqlite")
    connection = sqlite3.connect(other)
    connection.execute("DELETE FROM people WHERE id > 1")
    connection.commit()
    connection.close()
    counts = [(await pool.run(path, "SELECT count(*) FROM people")).rows[0][0] for path in (database, other) * 3]
    assert counts == [4, 1] * 3


async def test_a_slow_query_ends_at_its_own_deadline(pool: SqlPool, database: Path) -> None:
    for sql in (ENDLESS, UNINTERRUPTIBLE):
        started = time.perf_counter()
        with pytest.raises((SqlTimeout, SqlUnavailable)):
            await pool.run(database, sql, 0.3)
        assert 0.25 < time.perf_counter() - started <= 0.8


async def test_a_slow_query_is_stopped_without_a_kill_where_it_can_be(pool: SqlPool, database: Path) -> None:
    """Between two instructions the worker looks at the clock itself; only a very busy machine makes it late."""
    for attempt in range(10):
        with pytest.raises((SqlTimeout, SqlUnavailable)):
            await pool.run(database, ENDLESS, 0.2)
        await pool.run(database, "SELECT 1")
        if pool.stats.restarts <= attempt:
            return
    pytest.fail("every slow query cost its worker")


async def test_a_stalled_worker_is_not_a_slow_query(pool: SqlPool, database: Path) -> None:
    """A stopped process did nothing for the query: nobody knows what it is worth."""
    running = asyncio.ensure_future(pool.run(database, "SELECT count(*) FROM people", 0.4))
    os.kill(pool.pids[0], signal.SIGSTOP)
    with pytest.raises(SqlUnavailable, match="stalled"):
        await running
    assert (await pool.run(database, "SELECT count(*) FROM people")).rows == ((4,),)
    assert pool.stats.restarts == 1


async def test_a_killed_worker_costs_a_query_nothing(pool: SqlPool, database: Path) -> None:
    running = asyncio.ensure_future(pool.run(database, "SELECT sum(a.n * b.n) FROM numbers a, numbers b"))
    process = await until_busy(pool)
    process.kill()
    assert (await running).rows == ((sum(range(2000)) ** 2,),)
    assert pool.stats.restarts == 1


async def test_a_query_is_not_blamed_for_kills_from_outside(pool: SqlPool, database: Path) -> None:
    running = asyncio.ensure_future(pool.run(database, ENDLESS))
    for _ in range(2):
        process = await until_busy(pool)
        process.kill()
        while process.pid in pool.pids:
            await asyncio.sleep(0.01)
        while not pool.pids and not running.done():
            await asyncio.sleep(0.01)
    with pytest.raises(SqlUnavailable, match="SIGKILL"):
        await running


async def test_a_query_that_crashes_every_worker_is_refused(pool: SqlPool, database: Path) -> None:
    running = asyncio.ensure_future(pool.run(database, ENDLESS))
    for _ in range(2):
        process = await until_busy(pool)
        process.send_signal(signal.SIGSEGV)
        while process.pid in pool.pids:
            await asyncio.sleep(0.01)
        while not pool.pids and not running.done():
            await asyncio.sleep(0.01)
    with pytest.raises(SqlRefused, match="SIGSEGV"):
        await running


async def test_workers_killed_while_idle_are_replaced(database: Path) -> None:
    async with SqlPool(workers=3, limits=LIMITS) as pool:
        for _ in range(3):
            for pid in pool.pids:
                os.kill(pid, signal.SIGKILL)
            tables = await asyncio.gather(*(pool.run(database, "SELECT count(*) FROM people") for _ in range(6)))
            assert {table.rows for table in tables} == {((4,),)}


async def test_a_cancelled_query_frees_its_worker(pool: SqlPool, database: Path) -> None:
    running = asyncio.ensure_future(pool.run(database, ENDLESS))
    process = await until_busy(pool)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert (await pool.run(database, "SELECT count(*) FROM people")).rows == ((4,),)
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


async def test_a_cancelled_wait_takes_no_worker_with_it(pool: SqlPool, database: Path) -> None:
    running = asyncio.ensure_future(pool.run(database, "SELECT count(*) FROM numbers a, numbers b WHERE a.n < b.n"))
    await asyncio.sleep(0)
    waiting = [asyncio.ensure_future(pool.run(database, "SELECT 1")) for _ in range(5)]
    await asyncio.sleep(0)
    assert pool.stats.waiting == 5
    for task in waiting[::2]:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert (await running).rows == ((1999000,),)
    assert [task.cancelled() for task in waiting] == [True, False, True, False, True]
    assert (await pool.run(database, "SELECT 2")).rows == ((2,),)
    assert pool.stats.waiting == 0


async def test_the_queue_is_bounded(database: Path) -> None:
    async with SqlPool(workers=1, limits=LIMITS, max_waiting=3) as pool:
        running = [asyncio.ensure_future(pool.run(database, f"SELECT {n}")) for n in range(8)]
        outcomes = await asyncio.gather(*running, return_exceptions=True)
    assert sum(isinstance(outcome, SqlUnavailable) for outcome in outcomes) == 4
    assert pool.stats.answered == 4
    assert pool.stats.unavailable == 4


async def test_many_queries_at_once(database: Path) -> None:
    async with SqlPool(workers=2, limits=LIMITS) as pool:
        tables = await asyncio.gather(*(pool.run(database, f"SELECT {n}") for n in range(300)))
        assert [table.rows for table in tables] == [((n,),) for n in range(300)]
        assert len(pool.pids) == 2


async def test_closing_ends_processes_and_waits(database: Path) -> None:
    pool = SqlPool(workers=1, limits=LIMITS)
    await pool.start()
    processes = [psutil.Process(pid) for pid in pool.pids]
    running = [asyncio.ensure_future(pool.run(database, ENDLESS)) for _ in range(4)]
    await asyncio.sleep(0.1)
    await pool.close()
    outcomes = await asyncio.gather(*running, return_exceptions=True)
    assert all(isinstance(outcome, SqlUnavailable) for outcome in outcomes)
    assert not any(process.is_running() for process in processes)
    with pytest.raises(SqlUnavailable, match="not running"):
        await pool.run(database, "SELECT 1")


async def test_workers_end_with_the_process_that_made_them(database: Path, tmp_path: Path) -> None:
    """Killed outright, a rewarder cannot clean up: its workers see the pipe close, or their processor time end."""
    script = (
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from rewarders.sql.pool import SqlPool\n"
        "async def main():\n"
        "    async with SqlPool(workers=2) as pool:\n"
        "        print(*pool.pids, flush=True)\n"
        f"        await pool.run(Path({str(database)!r}), {ENDLESS!r}, 0.5)\n"
        "asyncio.run(main())\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[3]
    )
    assert process.stdout is not None
    workers = [psutil.Process(int(pid)) for pid in (await process.stdout.readline()).split()]
    process.kill()
    await process.wait()
    gone, alive = await asyncio.to_thread(psutil.wait_procs, workers, 10)
    assert len(gone) == 2
    assert not alive


async def test_start_is_quick(database: Path) -> None:
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        async with SqlPool(workers=2, limits=LIMITS):
            best = min(best, time.perf_counter() - started)
        if best < 0.5:
            break
    assert best < 0.5


async def test_a_worker_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SqlUnavailable, match="missing"):
        await SqlPool(workers=2, folders=[tmp_path / "missing"]).start()
    monkeypatch.setattr(worker_process, "_environment", dict)
    with pytest.raises(SqlUnavailable, match="No module named"):
        await SqlPool(workers=2).start()
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(SqlUnavailable, match="cannot start a SQL worker"):
        await SqlPool(workers=1).start()


async def test_a_pool_without_workers_says_so_and_recovers(pool: SqlPool, database: Path, tmp_path: Path) -> None:
    os.kill(pool.pids[0], signal.SIGKILL)
    away = database.parent.rename(tmp_path / "away")
    while pool.pids:
        await asyncio.sleep(0.01)
    with pytest.raises(SqlUnavailable):
        await pool.run(database, "SELECT 1")
    away.rename(database.parent)
    assert (await pool.run(database, "SELECT 1")).rows == ((1,),)


async def test_workers_get_no_secret_and_no_descriptor(
    database: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NCBI_API_KEY", "very-secret")
    with open(tmp_path / "open.txt", "w") as held:
        os.set_inheritable(held.fileno(), True)
        async with SqlPool(workers=1, limits=LIMITS) as pool:
            (pid,) = pool.pids
            if not Path(f"/proc/{pid}/environ").exists():
                pytest.skip("needs /proc")
            with contextlib.suppress(PermissionError):  # not even its own user may look into it
                assert b"very-secret" not in Path(f"/proc/{pid}/environ").read_bytes()
                assert len(os.listdir(f"/proc/{pid}/fd")) == 3
            assert pool.guards


@pytest.mark.parametrize("name", ["a b.sqlite", "100%.sqlite", "what?.sqlite", "a#b.sqlite", "ünï'code\".sqlite"])
async def test_any_file_name_opens(pool: SqlPool, database: Path, name: str) -> None:
    path = database.parent / name
    shutil.copy(database, path)
    assert (await pool.run(path, "SELECT count(*) FROM people")).rows == ((4,),)
    assert len(list(database.parent.iterdir())) == 2


async def test_a_database_that_cannot_serve_is_nobodys_fault(pool: SqlPool, database: Path, tmp_path: Path) -> None:
    folder = database.parent
    (folder / "empty.sqlite").touch()
    (folder / "text.sqlite").write_text("not a database, by far " * 100)
    (folder / "short.sqlite").write_bytes(database.read_bytes()[:5000])
    (folder / "folder.sqlite").mkdir()
    (folder / "link.sqlite").symlink_to(make_database(tmp_path / "outside.sqlite"))
    names = ("missing", "empty", "text", "short", "folder", "link")
    for path in (
        *(folder / f"{name}.sqlite" for name in names),
        tmp_path / "outside.sqlite",
        folder / ".." / "outside",
    ):
        with pytest.raises(SqlUnavailable, match="database"):
            await pool.run(path, "SELECT count(*) FROM people")
    assert (await pool.run(database, "SELECT 1")).rows == ((1,),)


@pytest.mark.parametrize("suffix", ["-wal", "-journal"])
async def test_a_database_with_unfinished_writes_is_refused(pool: SqlPool, database: Path, suffix: str) -> None:
    journal = Path(f"{database}{suffix}")
    journal.touch()
    assert (await pool.run(database, "SELECT 1")).rows == ((1,),)
    journal.write_bytes(b"x")
    with pytest.raises(SqlUnavailable, match="unfinished writes"):
        await pool.run(database, "SELECT 1")


def test_a_uri_is_read_only(database: Path) -> None:
    uri = database_uri(database)
    connection = sqlite3.connect(uri, uri=True)
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        connection.execute("DELETE FROM people")
    connection.close()
    assert [path.name for path in database.parent.iterdir()] == [database.name]


async def test_corrupted_files_end_in_a_verdict(pool: SqlPool, database: Path) -> None:
    """Whatever the bytes are, the answer comes in time and the pool goes on."""
    whole = database.read_bytes()
    broken = database.parent / "broken.sqlite"
    queries = ("SELECT * FROM people, numbers", "SELECT count(*) FROM adults", "SELECT * FROM sqlite_master")
    kinds = set()
    for seed in range(40):
        dice = random.Random(seed)
        content = bytearray(whole)
        first = 0 if seed % 4 else 18  # spare the magic words most of the time
        for _ in range(dice.choice((1, 10, 300))):
            content[dice.randrange(first, len(content))] = dice.randrange(256)
        broken.write_bytes(content)
        for sql in queries:
            try:
                kinds.add(type(await pool.run(broken, sql, 1.0)))
            except (SqlRefused, SqlTimeout, SqlUnavailable) as error:
                kinds.add(type(error))
        assert broken.read_bytes() == content
        assert (await pool.run(database, "SELECT count(*) FROM people")).rows == ((4,),)
    assert SqlUnavailable in kinds


async def test_result_limits(database: Path) -> None:
    limits = SqlLimits(max_rows=10, max_bytes=2000, max_columns=4, max_cell_bytes=100, max_sql_bytes=200)
    async with SqlPool(workers=1, limits=limits) as pool:
        exact = await pool.run(database, "SELECT n FROM numbers WHERE n < 10")
        assert len(exact.rows) == 10
        assert not exact.truncated
        assert (await pool.run(database, "SELECT n FROM numbers WHERE n < 11")).truncated
        assert (await pool.run(database, "SELECT printf('%99d', n), printf('%99d', n) FROM numbers")).truncated
        assert len((await pool.run(database, "SELECT 1, 2, 3, 4")).columns) == 4
        for sql in ("SELECT 1, 2, 3, 4, 5", "SELECT hex(printf('%99d', 1))", "SELECT 1 " + "-" * 200):
            with pytest.raises(SqlRefused):
                await pool.run(database, sql)


async def test_impossible_settings_are_refused(pool: SqlPool, database: Path) -> None:
    for deadline_s in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="deadline_s"):
            await pool.run(database, "SELECT 1", deadline_s)
    with pytest.raises(ValueError, match="worker"):
        SqlPool(workers=0)
    for options in ({"max_rows": 0}, {"heap_mb": 1}, {"heap_mb": 512}, {"deadline_s": 0.0}, {"stalled_share": 1.0}):
        with pytest.raises(ValueError, match="must"):
            SqlLimits(**options)  # type: ignore[arg-type]


async def test_an_answer_that_waits_in_the_pipe_is_not_late(pool: SqlPool, database: Path) -> None:
    """The event loop, not the query, is held up beyond the deadline: by a stop, a pause, a long comparison."""
    sql = "SELECT printf('%1000d', n) FROM numbers"
    running = asyncio.ensure_future(pool.run(database, sql, 0.3))
    await asyncio.sleep(0.01)
    time.sleep(1.5)
    assert len((await running).rows) == 2000
    assert pool.stats.restarts == 0
