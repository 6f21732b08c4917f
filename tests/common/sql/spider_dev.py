"""Spider's development questions with their databases, and gold queries changed as a model would get them wrong."""

from __future__ import annotations

import json
import os
import random
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from common.sql.table import Table

NO_DATA = "set DEEPRETRIEVAL_DATA to the folder of test data that holds spider_dev/"
_MAX_STEPS = 2_000_000
_STRING = re.compile(r"""(["'])([^"']+)\1""")
_NUMBER = re.compile(r"(?<=[\s=<>(])\d+\b(?!\s*\))")
_SELECTED = re.compile(r"^(\s*select\s+(?:distinct\s+)?)([^()]*?)(\s+from\b)", re.IGNORECASE)


class Gold(msgspec.Struct, frozen=True):
    """One question: its gold query, its database and the number of rows that came back when the data were made."""

    sql: str
    database: Path
    rows: int


def folder() -> Path | None:
    """Where the data lie; None if this machine has none."""
    root = os.environ.get("DEEPRETRIEVAL_DATA")
    path = Path(root) / "spider_dev" if root else None
    return path if path is not None and path.is_dir() else None


def questions() -> list[Gold]:
    """All questions; one of the databases, wta_1, has no rows in this edition."""
    root = folder()
    assert root is not None
    lines = (json.loads(line) for line in (root / "dev.jsonl").read_text().splitlines())
    return [
        Gold(line["query"], root / "database" / line["db_id"] / f"{line['db_id']}.sqlite", line["gold_rows"])
        for line in lines
    ]


class Databases:
    """Read-only connections, kept open; `run` gives None for a query that fails or takes too long."""

    def __init__(self) -> None:
        self._connections: dict[Path, sqlite3.Connection] = {}
        self._results: dict[tuple[Path, str], Table | None] = {}

    def run(self, database: Path, sql: str) -> Table | None:
        key = database, sql
        if key not in self._results:
            self._results[key] = self._execute(database, sql)
        return self._results[key]

    def _execute(self, database: Path, sql: str) -> Table | None:
        connection = self._connections.get(database) or self._connect(database)
        connection.set_progress_handler(lambda: 1, _MAX_STEPS)
        try:
            cursor = connection.execute(sql)
            rows: list[tuple[Any, ...]] = cursor.fetchall()
        except sqlite3.Error:
            return None
        names = tuple(column[0] for column in cursor.description)
        return Table(columns=names, rows=tuple(rows))

    def _connect(self, database: Path) -> sqlite3.Connection:
        connection = sqlite3.connect(f"{database.as_uri()}?mode=ro&immutable=1", uri=True)
        connection.text_factory = lambda data: data.decode("utf-8", "replace")
        self._connections[database] = connection
        return connection

    def close(self) -> None:
        for connection in self._connections.values():
            connection.close()


def mutations(sql: str, dice: random.Random) -> Iterator[tuple[str, str]]:
    """Yield (kind, changed query). Some do not run, some mean the same: that is for the rules to say."""
    sql = sql.strip().rstrip(";")
    yield from _changed_literals(sql, dice)
    if re.search(r"\bwhere\b", sql, re.IGNORECASE):
        ends = r"\bwhere\b.*?(?=\bgroup\b|\border\b|\blimit\b|\bunion\b|\bexcept\b|\bintersect\b|\)|$)"
        yield "no condition", re.sub(ends, "", sql, count=1, flags=re.IGNORECASE)
        yield (
            "no second condition",
            re.sub(r"\b(and|or)\b[^()]*?(?=\border|\bgroup|$)", "", sql, count=1, flags=re.IGNORECASE),
        )
    yield from _changed_columns(sql, dice)
    yield from _changed_rows(sql)


def _changed_literals(sql: str, dice: random.Random) -> Iterator[tuple[str, str]]:
    texts = list(_STRING.finditer(sql))
    if texts:
        chosen = dice.choice(texts)
        yield "text", sql[: chosen.start(2)] + "Nowhere" + sql[chosen.end(2) :]
        yield "cased text", sql[: chosen.start(2)] + chosen[2].swapcase() + sql[chosen.end(2) :]
    numbers = list(_NUMBER.finditer(sql))
    if numbers:
        chosen = dice.choice(numbers)
        yield "number", sql[: chosen.start()] + str(int(chosen[0]) + 1) + sql[chosen.end() :]
    for old, new in ((">", "<"), ("max(", "min("), ("sum(", "avg("), (" and ", " or "), ("intersect", "union")):
        if re.search(re.escape(old), sql, re.IGNORECASE):
            yield f"{old} to {new}", re.sub(re.escape(old), new, sql, count=1, flags=re.IGNORECASE)


def _changed_columns(sql: str, dice: random.Random) -> Iterator[tuple[str, str]]:
    selected = _SELECTED.match(sql)
    if selected is None:
        return
    rest = sql[selected.end(2) :]
    columns = [column.strip() for column in selected[2].split(",")]
    if len(columns) > 1:
        yield "swapped columns", selected[1] + ", ".join(columns[::-1]) + rest
        yield "shuffled columns", selected[1] + ", ".join(dice.sample(columns, len(columns))) + rest
        yield "fewer columns", selected[1] + ", ".join(columns[:-1]) + rest
        yield "one column twice", selected[1] + ", ".join([columns[0], *columns[:-1]]) + rest
    yield "more columns", selected[1] + ", ".join([*columns, "1"]) + rest
    yield "float column", selected[1] + ", ".join([f"{columns[0]} * 1.0", *columns[1:]]) + rest
    yield "rounding error", selected[1] + ", ".join([f"{columns[0]} * 3.3 / 3.3", *columns[1:]]) + rest


def _changed_rows(sql: str) -> Iterator[tuple[str, str]]:
    if re.search(r"\bdistinct\b", sql, re.IGNORECASE):
        yield "no distinct", re.sub(r"\bdistinct\b", "", sql, flags=re.IGNORECASE)
    else:
        yield "distinct", re.sub(r"\bselect\b", "SELECT DISTINCT", sql, count=1, flags=re.IGNORECASE)
    if re.search(r"\border\s+by\b", sql, re.IGNORECASE):
        yield "no order", re.sub(r"\border\s+by\b[^()]*$", "", sql, flags=re.IGNORECASE)
        yield "other order", re.sub(r"\bdesc\b", "ASC", sql, flags=re.IGNORECASE)
        ascending = re.compile(r"(\border\s+by\s+[\w.]+)(?!\s+(?:asc|desc))", re.IGNORECASE)
        yield "descending", ascending.sub(r"\1 DESC", sql, count=1)
    elif not re.search(r"\blimit\b", sql, re.IGNORECASE):
        yield "ordered", f"{sql} ORDER BY 1"
        yield "ordered down", f"{sql} ORDER BY 1 DESC"
        yield "twice", f"SELECT * FROM ({sql}) UNION ALL SELECT * FROM ({sql})"
        yield "without the first", f"SELECT * FROM ({sql}) LIMIT -1 OFFSET 1"
    yield "nothing", f"SELECT * FROM ({sql}) WHERE 1 = 2"
