"""Results kept on disk from run to run, shared by all rewarders of a host.

A cache is never worth a run: whatever is wrong with the file is said once and the run goes on without.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, TypeVar

from rewarders.cache.found import Found, decode_found, encode_found
from rewarders.cache.key import FORMAT, SearchKey
from rewarders.cache.table import Row, SearchTable, is_busy, is_damage
from rewarders.cache.table_thread import TableThread

T = TypeVar("T")

logger = logging.getLogger(__name__)

FILE_NAME: Final = f"searches-{FORMAT}.sqlite"
_TOUCH_AFTER_S: Final = 3600.0  # the order of use is this coarse, or every hit would be a write
_EVICT_EVERY: Final = 1 / 32  # of the bound, written by this process
_MAX_WAITING: Final = 4096  # rows; more are not kept
_NEW_FILES: Final = 3  # damaged files set aside before one stops trying


class DiskResults:
    """The file in `folder`.

    max_bytes: what is kept; the longest unused go first. max_age_s: age at which a result of data without a version
    counts as unknown. now: seconds since 1970.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_bytes: int = 1 << 30,
        max_age_s: float = 86_400.0,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.path = folder / FILE_NAME
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s
        self._now = now
        self._table = SearchTable(self.path)
        self._thread: TableThread | None = None
        self._touched: set[bytes] = set()
        self._written = 0  # bytes since the last look at what there is
        self._set_aside = 0
        self._writable = True

    @property
    def usable(self) -> bool:
        """Whether anything is still read."""
        return self._thread is not None

    async def start(self) -> None:
        """Open the file; without one, nothing is kept."""
        self._thread = TableThread(self._table, self._write)
        try:
            await self._thread.run(self._open)
        except (sqlite3.Error, OSError) as error:
            await self._give_up(error)

    async def close(self) -> None:
        """Write what waits, and close the file."""
        thread, self._thread = self._thread, None
        if thread is not None:
            await thread.close()

    async def get(self, key: SearchKey) -> Found | None:
        """What is kept under `key`, if it is not too old."""
        if self._thread is None:
            return None
        digest = key.digest
        try:
            row = await self._thread.run(lambda table: self._careful(table, lambda: table.get(digest)))
        except (sqlite3.Error, OSError) as error:
            if not is_busy(error):
                await self._give_up(error)
            return None
        now = self._now()
        if row is None or (not key.version and not 0 <= now - row.made_at < self._max_age_s):
            return None
        if now - row.used_at > _TOUCH_AFTER_S:
            self._touched.add(digest)
        try:
            return decode_found(row.value)
        except ValueError:
            return None  # the next answer takes its place

    def put(self, key: SearchKey, found: Found) -> None:
        """Keep a result soon, if that can be done."""
        if self._thread is None or not self._writable or self._thread.waiting >= _MAX_WAITING:
            return
        now = self._now()
        row = Row(key.digest, encode_found(found), key.readable, now, now)
        self._thread.put(row).add_done_callback(self._written_or_not)

    # In the thread.

    def _open(self, table: SearchTable) -> None:
        self._careful(table, table.open)
        table.evict(self._max_bytes)

    def _write(self, table: SearchTable, rows: Sequence[Row]) -> None:
        self._careful(table, lambda: table.replace(rows))
        if self._touched:
            touched, self._touched = self._touched, set()
            self._careful(table, lambda: table.touch(touched, self._now()))
        self._written += sum(row.size for row in rows)
        if self._written > self._max_bytes * _EVICT_EVERY:
            self._written = 0
            self._careful(table, lambda: table.evict(self._max_bytes))

    def _careful(self, table: SearchTable, work: Callable[[], T]) -> T | None:
        """`work()`, or None where it found the file damaged: then a new file is begun."""
        try:
            return work()
        except sqlite3.Error as error:
            if not is_damage(error) or self._set_aside >= _NEW_FILES:
                raise
        self._set_aside += 1
        aside = table.set_aside()
        if aside is not None:
            logger.warning("the search cache %s was damaged and is now %s; a new one is begun", self.path, aside.name)
        table.open()
        return None

    # Trouble.

    def _written_or_not(self, written: asyncio.Future[None]) -> None:
        error = None if written.cancelled() else written.exception()
        if error is not None and self._writable and not is_busy(error):
            self._writable = False
            logger.warning("search results are not kept on disk any more: %s: %s", self.path, error)

    async def _give_up(self, error: Exception) -> None:
        if self._thread is not None:
            logger.warning("the run goes on without search results on disk: %s: %s", self.path, error)
            await self.close()
