"""Run one query on one database inside a worker: open, bound, execute, fetch, and say whose fault a failure is."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterable
from functools import partial
from typing import Final

from common.sql.table import Row, row_bytes
from rewarders.sql.gatekeeper import TABLE_FUNCTIONS, Gatekeeper
from rewarders.sql.limits import SqlLimits
from rewarders.sql.wire import Failed, FailureKind, Query, Rows

# A virtual machine instruction takes some 50 ns: the clock is looked at every 0.1 ms, which costs about 0.2 %.
_STEPS_PER_CHECK: Final = 2000
_ROWS_SHOWN: Final = 20
_MAX_NAME_CHARS: Final = 200
_DEFENSIVE: Final = 1010
_MAX_REASON_CHARS: Final = 300
# Primary result codes that speak of the file, not of the query.
_FILE_ERRORS: Final = frozenset(
    {
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_PROTOCOL,
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_NOLFS,
    }
)
# Nothing may spill to disk, trust functions named in the file, or write, should the authorizer ever fail.
_PRAGMAS: Final = "temp_store=2", "trusted_schema=0", "cell_size_check=1", "query_only=1", "mmap_size=0", "threads=0"


def execute(query: Query, limits: SqlLimits) -> Rows | Failed:
    """Run `query` on a fresh connection, so that no query finds traces of another. Never raises an `Exception`."""
    ends = time.monotonic() + query.deadline_s
    try:
        with contextlib.closing(_connect(query.uri)) as connection:
            try:
                tables = _prepare(connection)
            except sqlite3.Error as error:
                return _failed("database", f"cannot read the database: {error}")
            return _run(connection, query.sql, tables, limits, ends)
    except sqlite3.Error as error:
        return _failed("database", f"cannot open the database: {error}")
    except Exception as error:
        return _failed("internal", f"{type(error).__name__}: {error}")


def set_heap_limit(limits: SqlLimits) -> None:
    """Bound what SQLite takes in this process, for good: it cannot be raised again."""
    connection = sqlite3.connect(":memory:")
    connection.execute(f"PRAGMA hard_heap_limit={limits.heap_mb << 20}")
    connection.close()


def _connect(uri: str) -> sqlite3.Connection:
    return sqlite3.connect(uri, uri=True, timeout=0, isolation_level=None, cached_statements=0)


def _prepare(connection: sqlite3.Connection) -> list[str]:
    """Set the connection up, read the schema and return the names of tables and views. An error is the file's fault."""
    # Foreign databases hold bytes that are not UTF-8; equal bytes stay equal.
    connection.text_factory = partial(str, encoding="utf-8", errors="replace")
    for pragma in _PRAGMAS:
        connection.execute(f"PRAGMA {pragma}")
    return [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')")]


def _run(connection: sqlite3.Connection, sql: str, tables: list[str], limits: SqlLimits, ends: float) -> Rows | Failed:
    gatekeeper = Gatekeeper(tables)
    try:
        _lock_up(connection, sql, limits, ends, gatekeeper)
        return _fetch(connection.execute(sql), limits)
    except sqlite3.Error as error:
        return _failed(_blame(error), f"not allowed: {gatekeeper.denied}" if gatekeeper.denied else str(error))
    except MemoryError:
        return _failed("refused", "the query needs more memory than it may have")
    except (sqlite3.Warning, ValueError) as error:
        return _failed("refused", str(error))


def _lock_up(connection: sqlite3.Connection, sql: str, limits: SqlLimits, ends: float, gatekeeper: Gatekeeper) -> None:
    """From here on every limit holds: for the query, not for the schema of the file, which is read already."""
    for name in TABLE_FUNCTIONS:
        if name in sql.lower():
            # Connecting one declares its columns, which the authorizer would take for a change of the schema.
            connection.execute(f"SELECT 1 FROM {name}('[]')").fetchall()
    for limit, value in _limit_values(limits):
        connection.setlimit(limit, value)
    setconfig = getattr(connection, "setconfig", None)
    if setconfig is not None:  # Python 3.12
        setconfig(_DEFENSIVE, True)
    connection.set_progress_handler(lambda: time.monotonic() > ends, _STEPS_PER_CHECK)
    connection.set_authorizer(gatekeeper)


def _limit_values(limits: SqlLimits) -> Iterable[tuple[int, int]]:
    return (
        (sqlite3.SQLITE_LIMIT_LENGTH, limits.max_cell_bytes),
        (sqlite3.SQLITE_LIMIT_SQL_LENGTH, limits.max_sql_bytes),
        (sqlite3.SQLITE_LIMIT_COLUMN, limits.max_columns),
        (sqlite3.SQLITE_LIMIT_EXPR_DEPTH, 200),
        (sqlite3.SQLITE_LIMIT_COMPOUND_SELECT, 50),
        (sqlite3.SQLITE_LIMIT_VDBE_OP, 250_000),
        (sqlite3.SQLITE_LIMIT_FUNCTION_ARG, 100),
        (sqlite3.SQLITE_LIMIT_ATTACHED, 0),
        (sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 100),
        (sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, 1),
        (sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH, 1),
        (sqlite3.SQLITE_LIMIT_WORKER_THREADS, 0),
    )


def _fetch(cursor: sqlite3.Cursor, limits: SqlLimits) -> Rows | Failed:
    """Take rows one by one until they end or become too many."""
    if cursor.description is None:
        return _failed("refused", "there is no query in the text")
    columns = tuple(column[0][:_MAX_NAME_CHARS] for column in cursor.description)
    rows: list[Row] = []
    size = 0
    truncated = False
    for row in cursor:
        size += row_bytes(row)
        if len(rows) == limits.max_rows or size > limits.max_bytes:
            truncated = True
            break
        rows.append(row)
    shown = tuple(rows[:_ROWS_SHOWN] if truncated else rows)
    return Rows(columns=columns, rows=shown, truncated=truncated, cpu_s=time.process_time())


def _blame(error: sqlite3.Error) -> FailureKind:
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
    if code == sqlite3.SQLITE_IOERR_NOMEM:
        return "refused"
    if code & 0xFF == sqlite3.SQLITE_INTERRUPT:
        return "timeout"
    return "database" if code & 0xFF in _FILE_ERRORS else "refused"


def _failed(kind: FailureKind, reason: str) -> Failed:
    line = " ".join(reason.split())[:_MAX_REASON_CHARS]
    return Failed(kind=kind, reason=line, cpu_s=time.process_time())
