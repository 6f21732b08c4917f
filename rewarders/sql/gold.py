"""Results of gold queries, run once each and remembered.

The original runs the gold query again for every sample, and takes one that timed out for an empty table, which every
empty prediction then equals. Here a gold query without a result is an error that carries no reward.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import msgspec

from common.sql.table import Table
from common.sql.text import unstable
from rewarders.sql.errors import GoldUnusable, SqlError, SqlRefused, SqlTimeout, SqlUnavailable
from rewarders.sql.pool import SqlPool

Key = tuple[str, int, int, str]


class _Entry(msgspec.Struct, frozen=True):
    """outcome: the table, or why there is none. expires: the clock's time after which to ask again, None for never."""

    outcome: Table | SqlError
    size: int
    expires: float | None


class GoldResults:
    """LRU cache of gold results, keyed by database file (path, size, time of change) and text; single flight.

    deadline_s: seconds for a gold query, None for the pool's; some gold queries of BIRD need minutes. max_entries,
    max_bytes: results kept. retry_s: seconds until a gold query that was too slow is tried again, so that not every
    sample waits for it. Use it on the pool's event loop.
    """

    def __init__(
        self,
        pool: SqlPool,
        *,
        deadline_s: float | None = None,
        max_entries: int = 10_000,
        max_bytes: int = 256 << 20,
        retry_s: float = 300.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if max_entries < 0 or max_bytes < 0:
            raise ValueError("cache sizes must not be negative")
        self._pool = pool
        self._deadline_s = deadline_s
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._retry_s = retry_s
        self._clock = clock
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()
        self._flights: dict[Key, asyncio.Task[Table | SqlError]] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    async def get(self, database: Path, sql: str) -> Table:
        """Return the whole result of a gold query.

        Raises GoldUnusable if the query is refused or its result is larger than the pool's limits, SqlUnavailable if
        it was too slow or could not be run; never anything that would blame a prediction.
        """
        key = _key(database, sql)
        entry = self._fresh(key)
        if entry is not None:
            return _unwrap(entry.outcome)
        flight = self._flights.get(key) or self._take_off(key, database, sql)
        try:
            # A caller that gives up leaves the query running: its result is wanted again soon.
            return _unwrap(await asyncio.shield(flight))
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if flight.cancelled() and not (caller and caller.cancelling()):
                raise SqlUnavailable("the gold query was given up at shutdown") from None
            raise

    async def close(self) -> None:
        """Give up what is running; whoever waits for it gets SqlUnavailable."""
        flights = list(self._flights.values())
        for flight in flights:
            flight.cancel()
        await asyncio.gather(*flights, return_exceptions=True)

    def _take_off(self, key: Key, database: Path, sql: str) -> asyncio.Task[Table | SqlError]:
        flight = self._flights[key] = asyncio.ensure_future(self._fly(key, database, sql))
        flight.add_done_callback(lambda _: self._flights.pop(key, None))
        return flight

    async def _fly(self, key: Key, database: Path, sql: str) -> Table | SqlError:
        outcome = await self._ask(database, sql)
        self._store(key, outcome)
        return outcome

    async def _ask(self, database: Path, sql: str) -> Table | SqlError:
        try:
            table = await self._pool.run(database, sql, self._deadline_s)
        except SqlRefused as error:
            return GoldUnusable(f"the gold query is refused ({error.reason}): leave its question out of the data")
        except SqlTimeout as error:
            return SqlTimeout(error.reason)
        except SqlUnavailable as error:
            return error
        if table.truncated:
            return GoldUnusable("the gold query returns too much: raise the limits or leave its question out")
        return table

    def _fresh(self, key: Key) -> _Entry | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry.expires is not None and self._clock() >= entry.expires:
            self._forget(key)
            return None
        self._entries.move_to_end(key)
        return entry

    def _store(self, key: Key, outcome: Table | SqlError) -> None:
        """Keep tables and lasting failures; what was only unavailable, or depends on the clock, is asked again."""
        if isinstance(outcome, Table):
            if "clock" in unstable(key[3]):
                return
            entry = _Entry(outcome, outcome.size_bytes() + len(key[3]), None)
        elif isinstance(outcome, GoldUnusable):
            entry = _Entry(outcome, len(key[3]), None)
        elif isinstance(outcome, SqlTimeout):
            entry = _Entry(outcome, len(key[3]), self._clock() + self._retry_s)
        else:
            return
        self._entries[key] = entry
        self._bytes += entry.size
        while self._entries and (len(self._entries) > self._max_entries or self._bytes > self._max_bytes):
            self._forget(next(iter(self._entries)))

    def _forget(self, key: Key) -> None:
        self._bytes -= self._entries.pop(key).size


def _key(database: Path, sql: str) -> Key:
    """A changed file is another database."""
    size, changed = 0, 0
    with contextlib.suppress(OSError):
        status = os.stat(database)
        size, changed = status.st_size, status.st_mtime_ns
    return str(database), size, changed, sql


def _unwrap(outcome: Table | SqlError) -> Table:
    """A fresh exception for every caller: one object raised in several tasks would mix their tracebacks."""
    if isinstance(outcome, Table):
        return outcome
    if isinstance(outcome, GoldUnusable):
        raise GoldUnusable(outcome.reason)
    if isinstance(outcome, SqlTimeout):
        raise SqlUnavailable(f"the gold query was too slow here: {outcome.reason}")
    raise SqlUnavailable(outcome.reason)
