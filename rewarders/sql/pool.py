"""A fixed number of jailed processes that run SQL nobody trusts.

A query gets a process for itself. One that is late, or ends its process, costs that process and no more: it is killed,
and a new one takes its place. See `rewarders.sql.confinement` and `gatekeeper` for what a query cannot do.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NoReturn

import msgspec

from common.sql.table import Table
from rewarders.lifecycle import Started
from rewarders.sql.errors import SqlError, SqlRefused, SqlTimeout, SqlUnavailable
from rewarders.sql.limits import SqlLimits, require_seconds
from rewarders.sql.wire import Failed, Query, Rows
from rewarders.sql.worker_process import WorkerDied, WorkerLate, WorkerProcess

# A query that ends this many workers is to blame for it; one dead worker may be anybody's fault. It is never to blame
# for a signal that only somebody outside sends: the limits end a process by others.
_DEATHS_TO_BLAME: Final = 2
_FROM_OUTSIDE: Final = frozenset({signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT})


class SqlStats(msgspec.Struct):
    """Counts since the start. answered: tables. refused, timeouts, unavailable: errors by kind. restarts: workers
    replaced. waiting: callers without a worker just now.
    """

    answered: int = 0
    refused: int = 0
    timeouts: int = 0
    unavailable: int = 0
    restarts: int = 0
    waiting: int = 0


class _Slot:
    """The place of one worker. worker: None while it is being replaced, or if that failed."""

    def __init__(self) -> None:
        self.worker: WorkerProcess | None = None


class SqlPool(Started):
    """Runs queries on database files; use it as an async context manager, on one event loop.

    workers: processes, hence queries at once. folders: where databases lie; a worker can read nothing else where the
    system allows to enforce that (Landlock), and `run` refuses other paths everywhere; none means any path.
    max_waiting: callers that may wait for a worker; more get SqlUnavailable at once.
    """

    def __init__(
        self,
        *,
        workers: int = 2,
        limits: SqlLimits | None = None,
        folders: Sequence[Path] = (),
        max_waiting: int = 1000,
    ) -> None:
        if workers < 1 or max_waiting < 0:
            raise ValueError(f"a SQL pool needs a worker and no negative queue, got {workers} and {max_waiting}")
        self.limits = limits or SqlLimits()
        self.stats = SqlStats()
        self._folders = tuple(Path(os.path.realpath(folder)) for folder in folders)
        self._max_waiting = max_waiting
        self._slots = [_Slot() for _ in range(workers)]
        self._idle: asyncio.Queue[_Slot | None] = asyncio.Queue()
        self._replacements: set[asyncio.Task[None]] = set()
        self._open = False

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that live."""
        return [slot.worker.pid for slot in self._slots if slot.worker is not None and slot.worker.alive]

    @property
    def guards(self) -> tuple[str, ...]:
        """What this system lets the workers enforce on themselves; see `confinement.confine`."""
        return next((slot.worker.ready.guards for slot in self._slots if slot.worker is not None), ())

    async def start(self) -> None:
        """Start every worker at once. Raises SqlUnavailable with one clear line if one cannot start."""
        self._open = True
        try:
            outcomes = await asyncio.gather(*map(self._fill, self._slots), return_exceptions=True)
            for outcome in outcomes:
                if outcome is not None:
                    raise outcome
        except BaseException:
            await self.close()
            raise
        for slot in self._slots:
            self._idle.put_nowait(slot)

    async def close(self) -> None:
        """Kill the workers; whoever waits or runs gets SqlUnavailable."""
        self._open = False
        for _ in range(self.stats.waiting):
            self._idle.put_nowait(None)
        await asyncio.gather(*self._replacements, return_exceptions=True)
        for slot in self._slots:
            if slot.worker is not None:
                await slot.worker.reap()

    async def run(self, database: Path, sql: str, deadline_s: float | None = None) -> Table:
        """Run one query and return its result, truncated if it is larger than the limits.

        deadline_s: seconds for this query instead of the limits'; the answer or the error comes within half a second
        more, once a worker is free. Raises SqlRefused, SqlTimeout or SqlUnavailable.
        """
        try:
            table = await self._checked(database, sql, self.limits.deadline_s if deadline_s is None else deadline_s)
        except SqlRefused:
            self.stats.refused += 1
            raise
        except SqlTimeout:
            self.stats.timeouts += 1
            raise
        except SqlUnavailable:
            self.stats.unavailable += 1
            raise
        self.stats.answered += 1
        return table

    async def _checked(self, database: Path, sql: str, deadline_s: float) -> Table:
        require_seconds("deadline_s", deadline_s)
        _check_text(sql, self.limits)
        query = Query(uri=database_uri(database, self._folders), sql=sql, deadline_s=deadline_s)
        for _ in range(_DEATHS_TO_BLAME):
            slot = await self._take()
            try:
                return await self._run_in(slot, query)
            except WorkerDied as died:
                last = died
                if not self._open:
                    raise SqlUnavailable("the SQL pool was closed") from None
            finally:
                self._give_back(slot)
            if last.signal_number == signal.SIGXCPU:
                raise SqlTimeout(_too_slow(query))
        if last.signal_number in _FROM_OUTSIDE:
            raise SqlUnavailable(last.reason)
        raise SqlRefused(f"the query ended {_DEATHS_TO_BLAME} workers: {last.reason}")

    async def _take(self) -> _Slot:
        """Wait for an idle worker; start one in its place if it is gone."""
        if not self._open:
            raise SqlUnavailable("the SQL pool is not running: start it first")
        if self.stats.waiting >= self._max_waiting:
            raise SqlUnavailable(f"{self.stats.waiting} queries wait for a SQL worker already")
        self.stats.waiting += 1
        try:
            slot = await self._idle.get()
        finally:
            self.stats.waiting -= 1
        if slot is None:
            raise SqlUnavailable("the SQL pool was closed")
        if slot.worker is None or not slot.worker.alive:
            try:
                await self._fill(slot)
            except BaseException:
                self._idle.put_nowait(slot)
                raise
        return slot

    async def _run_in(self, slot: _Slot, query: Query) -> Table:
        assert slot.worker is not None
        try:
            answer, cpu_s = await slot.worker.ask(query)
        except WorkerLate as late:
            self._raise_late(query, late.cpu_s)
        if isinstance(answer, Rows):
            return Table(columns=answer.columns, rows=answer.rows, truncated=answer.truncated)
        if answer.kind == "timeout":
            self._raise_late(query, cpu_s)
        raise _error(answer)

    def _raise_late(self, query: Query, cpu_s: float | None) -> NoReturn:
        """A query is too slow if its process could work; if it was held up, its worth is unknown.

        Without /proc a killed worker's processor time is not known, and its query counts as slow.
        """
        if cpu_s is not None and cpu_s < self.limits.stalled_share * query.deadline_s:
            raise SqlUnavailable(f"the SQL worker stalled: {cpu_s:.2f} s of work in {query.deadline_s:g} s")
        raise SqlTimeout(_too_slow(query))

    def _give_back(self, slot: _Slot) -> None:
        """Make the slot idle again, after its worker was replaced if it has to be."""
        if not self._open:
            return
        if slot.worker is not None and slot.worker.alive:
            self._idle.put_nowait(slot)
            return
        task = asyncio.ensure_future(self._replace(slot))
        self._replacements.add(task)
        task.add_done_callback(self._replacements.discard)

    async def _replace(self, slot: _Slot) -> None:
        self.stats.restarts += 1
        try:
            # If no worker can start, the next query to get this slot tries again and says why it cannot.
            with contextlib.suppress(SqlUnavailable):
                await self._fill(slot)
        finally:
            self._idle.put_nowait(slot)

    async def _fill(self, slot: _Slot) -> None:
        """Put a new worker into the slot, in place of the dead one."""
        dead, slot.worker = slot.worker, None
        if dead is not None:
            await dead.reap()
        if not self._open:
            raise SqlUnavailable("the SQL pool was closed")
        try:
            worker = await WorkerProcess.start(self.limits, self._folders)
        except WorkerDied as died:
            raise SqlUnavailable(died.reason) from None
        if not self._open:
            await worker.reap()
            raise SqlUnavailable("the SQL pool was closed")
        slot.worker = worker


def database_uri(database: Path, folders: Sequence[Path] = ()) -> str:
    """Return the read-only SQLite URI of a database file.

    `immutable` spares every lock and never creates a file, but is right only for a file at rest, with nothing left in
    a journal. folders: real paths; the file must lie in one of them, if there are any. Raises SqlUnavailable if the
    file cannot serve.
    """
    path = os.path.realpath(database)
    try:
        status = os.stat(path)
    except OSError as error:
        raise SqlUnavailable(f"cannot read the database {database}: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
        raise SqlUnavailable(f"the database {database} is not a file with content")
    if folders and not any(Path(path).is_relative_to(folder) for folder in folders):
        raise SqlUnavailable(f"the database {database} lies outside the folders of the SQL pool")
    for suffix in ("-wal", "-journal"):
        if _has_content(path + suffix):
            raise SqlUnavailable(
                f"the database {database} has unfinished writes in {suffix}: open and close it once with sqlite3"
            )
    return Path(path).as_uri() + "?mode=ro&immutable=1"


def _has_content(path: str) -> bool:
    try:
        return os.stat(path).st_size > 0
    except OSError:
        return False


def _check_text(sql: str, limits: SqlLimits) -> None:
    """Raise SqlRefused for a text that no statement can be."""
    if "\0" in sql:
        raise SqlRefused("the query contains a NUL character")
    try:
        size = len(sql.encode("utf-8"))
    except UnicodeEncodeError:
        raise SqlRefused("the query is not valid Unicode text") from None
    if size > limits.max_sql_bytes:
        raise SqlRefused(f"the query is longer than {limits.max_sql_bytes} bytes")
    if not sql.strip():
        raise SqlRefused("there is no query in the text")


def _error(failed: Failed) -> SqlError:
    return SqlRefused(failed.reason) if failed.kind == "refused" else SqlUnavailable(failed.reason)


def _too_slow(query: Query) -> str:
    return f"the query ran longer than {query.deadline_s:g} s"
