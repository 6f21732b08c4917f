"""A SQLite file of search results that any number of processes of one host may use at once.

WAL: readers and the one writer do not wait for each other, and a process killed at any moment leaves the file whole.
Everything here blocks and belongs to one thread: `TableThread`.
"""

from __future__ import annotations

import contextlib
import fcntl
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec

ROW_BYTES: Final = 256  # what a row takes beside its value and text, both indexes included
_CORRUPT: Final = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS searches (
  digest BLOB NOT NULL PRIMARY KEY, value BLOB NOT NULL, asked TEXT NOT NULL,
  made_at REAL NOT NULL, used_at REAL NOT NULL, size INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS by_use ON searches (used_at, size);
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
"""


class Row(msgspec.Struct, frozen=True):
    """One result. asked: the key, readable. made_at, used_at: seconds since 1970."""

    digest: bytes
    value: bytes
    asked: str
    made_at: float
    used_at: float

    @property
    def size(self) -> int:
        """Bytes it counts for."""
        return len(self.value) + len(self.asked) + ROW_BYTES


class SearchTable:
    """The file at `path`; `read_only` opens one that exists and changes nothing. busy_s: how long another process is
    waited for."""

    def __init__(self, path: Path, read_only: bool = False, busy_s: float = 5.0) -> None:
        self.path = path
        self._busy_s = busy_s
        self._read_only = read_only
        self._connection: sqlite3.Connection | None = None

    def open(self) -> None:
        """Open the file, and make it and its folder where there is none.

        Raises:
            OSError: the folder cannot be made. sqlite3.Error: the file cannot be used; see `is_damage`.
        """
        if self._read_only:
            self._connection = self._opened_to_read()
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._alone():
            self._connection = self._opened()

    def close(self) -> None:
        """Close the file; the last process to do so leaves one file without a WAL beside it."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):
                connection.close()

    def get(self, digest: bytes) -> Row | None:
        """The row under `digest`."""
        query = "SELECT digest, value, asked, made_at, used_at FROM searches WHERE digest = ?"
        found = self.connection.execute(query, (digest,)).fetchone()
        return None if found is None else Row(*found)

    def replace(self, rows: Sequence[Row]) -> None:
        """Keep rows, in the place of earlier ones of the same digest: all of them, or none."""
        self._insert("REPLACE", rows)

    def add(self, rows: Sequence[Row]) -> None:
        """Keep those rows whose digest is new: all of them, or none."""
        self._insert("IGNORE", rows)

    def touch(self, digests: Iterable[bytes], now: float) -> None:
        """These rows were used."""
        with self.connection:
            self.connection.execute("BEGIN IMMEDIATE")
            self.connection.executemany(
                "UPDATE searches SET used_at = ? WHERE digest = ?", [(now, digest) for digest in digests]
            )

    def evict(self, max_bytes: int) -> int:
        """Where rows count for more than `max_bytes`, remove the longest unused, a tenth more than needed. Returns how
        many."""
        with self.connection:
            self.connection.execute("BEGIN IMMEDIATE")
            over = self.bytes - max_bytes
            if over <= 0:
                return 0
            over += max_bytes // 10
            going = []
            for rowid, size in self.connection.execute("SELECT rowid, size FROM searches ORDER BY used_at, size"):
                if over <= 0:
                    break
                going.append((rowid,))
                over -= size
            self.connection.executemany("DELETE FROM searches WHERE rowid = ?", going)
        return len(going)

    def fact(self, name: str) -> str | None:
        """What the file says of itself under `name`."""
        found = self.connection.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return None if found is None else str(found[0])

    def state(self, name: str, value: str) -> None:
        """Say something of the file that is not said yet."""
        with self.connection:
            self.connection.execute("INSERT OR IGNORE INTO facts VALUES (?, ?)", (name, value))

    @property
    def bytes(self) -> int:
        """What the rows count for."""
        return int(self.connection.execute("SELECT COALESCE(SUM(size), 0) FROM searches").fetchone()[0])

    @property
    def rows(self) -> int:
        """How many there are."""
        return int(self.connection.execute("SELECT COUNT(*) FROM searches").fetchone()[0])

    @property
    def connection(self) -> sqlite3.Connection:
        """The open file."""
        if self._connection is None:
            raise sqlite3.ProgrammingError(f"{self.path} is closed")
        return self._connection

    def set_aside(self) -> Path | None:
        """Rename a damaged file, so that the next `open` begins a new one. None if another process already did."""
        opened = self._connection is not None and self._identity
        self.close()
        with self._alone():
            if opened and opened != _identity(self.path):
                return None
            aside = self.path.with_name(f"{self.path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
            for suffix in ("-wal", "-shm"):
                self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):
                self.path.replace(aside)
            return aside

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Opening and setting aside exclude each other over all processes of the host."""
        with self.path.with_name(self.path.name + ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _opened(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=self._busy_s, isolation_level=None)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("PRAGMA journal_size_limit = 67108864")
            connection.executescript(_SCHEMA)
            connection.execute("SELECT 1 FROM searches LIMIT 1").fetchone()
        except BaseException:
            connection.close()
            raise
        self._identity = _identity(self.path)
        return connection

    def _opened_to_read(self) -> sqlite3.Connection:
        """A WAL file can be read only where its index can be written; elsewhere (a read-only disk) nobody writes."""
        for mode in ("mode=ro", "immutable=1"):
            connection = sqlite3.connect(
                f"{self.path.resolve().as_uri()}?{mode}", uri=True, timeout=self._busy_s, isolation_level=None
            )
            try:
                connection.execute("SELECT 1 FROM searches LIMIT 1").fetchone()
            except sqlite3.OperationalError:
                connection.close()
                if mode == "immutable=1":
                    raise
            else:
                return connection
        raise AssertionError("unreachable: the second way returns or raises")

    def _insert(self, where_taken: str, rows: Sequence[Row]) -> None:
        values = [(row.digest, row.value, row.asked, row.made_at, row.used_at, row.size) for row in rows]
        with self.connection:
            self.connection.execute("BEGIN IMMEDIATE")
            self.connection.executemany(f"INSERT OR {where_taken} INTO searches VALUES (?, ?, ?, ?, ?, ?)", values)


def is_damage(error: BaseException) -> bool:
    """Whether a file's content is at fault, and not the disk, a lock or a right."""
    return isinstance(error, sqlite3.Error) and _code(error) in _CORRUPT


def is_busy(error: BaseException) -> bool:
    """Whether another process held the file for too long."""
    return isinstance(error, sqlite3.Error) and _code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _code(error: sqlite3.Error) -> int:
    return (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF  # without the extension


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        about = path.stat()
    except OSError:
        return None
    return about.st_dev, about.st_ino
