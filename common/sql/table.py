"""The result of a query, as it travels between the jail, the cache and the comparators."""

from __future__ import annotations

import msgspec

Cell = int | float | str | bytes | None
Row = tuple[Cell, ...]

_CELL_BYTES = 16


class Table(msgspec.Struct, frozen=True):
    """What a query returned.

    columns: names as the engine gives them; no comparator looks at them. rows: in the engine's order, each with one
    cell per column. truncated: there were more rows or bytes than the jail lets through; `rows` then holds the first
    few, to look at, never to compare.
    """

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    truncated: bool = False

    def size_bytes(self) -> int:
        """About what the table takes in memory, for caches that are bounded by it."""
        return sum(row_bytes(row) for row in self.rows) + _CELL_BYTES * len(self.columns)


def row_bytes(row: Row) -> int:
    """About what one row takes, in bytes: its texts and blobs, and a fixed sum for every cell."""
    return _CELL_BYTES * (len(row) + 1) + sum(len(cell) for cell in row if isinstance(cell, str | bytes))
