"""What the pool and a worker say to each other: MessagePack in frames (`rewarders.frames`), over two pipes."""

from __future__ import annotations

from itertools import chain
from typing import Any, Final, Literal

import msgspec

from rewarders.sql.limits import SqlLimits

FailureKind = Literal["refused", "timeout", "database", "internal"]


class Setup(msgspec.Struct, frozen=True):
    """First frame to a worker. folders: all it may read from now on; none means wherever a query's URI points."""

    limits: SqlLimits
    folders: tuple[str, ...]


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """First frame from a worker: jailed. sqlite: version. guards: what this system lets it enforce on itself.

    cpu_s, here and in every answer: processor seconds of the process so far.
    """

    sqlite: str
    guards: tuple[str, ...]
    cpu_s: float


class Query(msgspec.Struct, frozen=True):
    """uri: the database as an SQLite URI (ASCII, read-only). deadline_s: seconds of wall time."""

    uri: str
    sql: str
    deadline_s: float


class Rows(msgspec.Struct, frozen=True, tag="rows"):
    """The query ran. rows: cells as MessagePack gives them; `checked` makes sure that they are cells."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    truncated: bool
    cpu_s: float


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """refused, timeout: the query's fault. database: the file cannot be read. internal: the worker's own."""

    kind: FailureKind
    reason: str
    cpu_s: float


Reply = Ready | Rows | Failed

_CELL_TYPES: Final = frozenset({int, float, str, bytes, type(None)})


def checked(rows: Rows) -> Rows:
    """Raise msgspec.ValidationError if a cell is no `Cell` (the decoder cannot tell text from bytes in one type)."""
    strange = set(map(type, chain.from_iterable(rows.rows))) - _CELL_TYPES
    if strange or any(len(row) != len(rows.columns) for row in rows.rows):
        raise msgspec.ValidationError("a row does not hold one text, number, blob or NULL per column")
    return rows
