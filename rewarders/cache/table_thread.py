"""A `SearchTable` in a thread of its own: the event loop never waits for the disk."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from rewarders.cache.table import Row, SearchTable

T = TypeVar("T")
Write = Callable[[SearchTable, Sequence[Row]], None]


class TableThread:
    """Runs what it is given one after the other; rows that come while the disk is busy are written together.

    write: writes some rows, in the thread.
    """

    def __init__(self, table: SearchTable, write: Write) -> None:
        self.waiting = 0
        self._table = table
        self._write = write
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="search-results")
        self._rows: list[tuple[Row, asyncio.Future[None]]] = []
        self._writer: asyncio.Task[None] | None = None

    async def run(self, work: Callable[[SearchTable], T]) -> T:
        """`work(table)` in the thread. Raises what it raises."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, work, self._table)

    def put(self, row: Row) -> asyncio.Future[None]:
        """Write a row soon; the future is done when it is safe from the death of this process, and has the error if
        it cannot be written."""
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._rows.append((row, written))
        self.waiting += 1
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write_all())
        return written

    async def close(self) -> None:
        """Write what waits, then close table and thread."""
        if self._writer is not None:
            await self._writer
        await self.run(SearchTable.close)
        self._executor.shutdown(wait=False)

    async def _write_all(self) -> None:
        while self._rows:
            batch, self._rows = self._rows, []
            rows = [row for row, _ in batch]
            failure: Exception | None = None
            try:
                await self.run(lambda table, rows=rows: self._write(table, rows))  # type: ignore[misc]
            except Exception as error:  # told to whoever waits for the row
                failure = error
            self.waiting -= len(batch)
            for _, written in batch:
                if not written.done():
                    written.set_result(None) if failure is None else written.set_exception(failure)
