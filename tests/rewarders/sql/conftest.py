from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from rewarders.sql.limits import SqlLimits
from rewarders.sql.pool import SqlPool

# Small, so that a bomb meets its limit soon.
LIMITS = SqlLimits(deadline_s=5.0, max_rows=5000, max_bytes=4 << 20, heap_mb=64, memory_mb=256)

_SCHEMA = """
CREATE TABLE people (id INTEGER PRIMARY KEY, name TEXT, age REAL, photo BLOB);
CREATE TABLE numbers (n INTEGER);
CREATE VIEW adults AS SELECT name, age FROM people WHERE age >= 18;
CREATE VIEW evil AS SELECT load_extension('evil.so') AS x;
"""


def make_database(path: Path) -> Path:
    """Four people, the numbers below 2,000, and a view that nobody should run."""
    connection = sqlite3.connect(path)
    connection.executescript(_SCHEMA)
    people = [(1, "Ada", 36.5, b"\x00\xff"), (2, "Bo", 17.0, None), (3, "Çelik", 40.0, b""), (4, None, None, None)]
    connection.executemany("INSERT INTO people VALUES (?, ?, ?, ?)", people)
    connection.executemany("INSERT INTO numbers VALUES (?)", [(n,) for n in range(2000)])
    connection.commit()
    connection.close()
    return path


@pytest.fixture
def database(tmp_path: Path) -> Path:
    folder = tmp_path / "databases"
    folder.mkdir()
    return make_database(folder / "people.sqlite")


@pytest.fixture
async def pool(database: Path) -> AsyncIterator[SqlPool]:
    async with SqlPool(workers=1, limits=LIMITS, folders=[database.parent]) as pool:
        yield pool
