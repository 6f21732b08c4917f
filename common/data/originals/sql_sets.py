"""Questions about databases as BIRD (Li et al. 2023, arXiv 2305.03111) and Spider (Yu et al. 2018, arXiv 1809.08887)
publish them.

The questions are one JSON list a file, or the original's extract as JSON lines; the databases lie somewhere below as
NAME/NAME.sqlite. A question's tables are the CREATE TABLE statements of its database.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.data.beir import DataError
from common.data.originals.raw_files import RawSet, files_below, json_objects, split_of, text_of
from common.tasks.row import Row

# Of the official archives; beside them lie files of the same shape with other questions, or with tables.
QUESTION_FILES = ("train", "train_spider", "train_others", "dev", "test")


def read_sql_set(folder: Path, roles: Mapping[str, str]) -> RawSet:
    """The questions of every file whose name says which split it is, and the databases. Raises DataError."""
    found = RawSet(databases=databases_below(folder))
    schemas = {name: schema_of(path) for name, path in found.databases.items()}
    for path in files_below(folder, ".json", ".jsonl"):
        split = split_of(path, roles)
        official = path.name.split(".")[0] in QUESTION_FILES
        if split is None or not (official or ".jsonl" in path.name):
            continue
        start = len(found.splits.get(split, ()))
        read = [_row(row, f"{split}-{start + n}", schemas, place) for n, (place, row) in enumerate(json_objects(path))]
        # Without any database the questions are still of use to look at; with some, one that has none is none.
        rows = [row for row in read if row.tables or not schemas]
        found.leave_out("no database", len(read) - len(rows))
        found.add(split, rows)
    return found


def databases_below(folder: Path) -> dict[str, Path]:
    """Every database of the folder by name: the first of files with the same name."""
    found: dict[str, Path] = {}
    for path in (*files_below(folder, ".sqlite"), *files_below(folder, ".db")):
        if path.suffix != ".gz":
            found.setdefault(path.stem, path)
    return found


def schema_of(path: Path) -> str:
    """The CREATE TABLE statements of a database, as it holds them, in the order of its tables.

    Raises:
        DataError: the file is no database.
    """
    statement = "SELECT sql FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite~_%' ESCAPE '~'"
    uri = f"{path.resolve().as_uri()}?mode=ro&immutable=1"
    try:
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as connection:
            tables = [sql.strip().rstrip(";") for (sql,) in connection.execute(statement) if sql]
    except sqlite3.DatabaseError as error:
        raise DataError(f"{path} is no database SQLite can read ({error}): download it again") from None
    return "".join(f"{table};\n\n" for table in tables).strip()


def _row(row: Mapping[str, Any], number: str, schemas: Mapping[str, str], place: str) -> Row:
    database = text_of(row, ("db_id", "database"), place)
    identifier = row.get("question_id")
    return Row(
        number if identifier is None else str(identifier),
        text_of(row, ("question", "text"), place),
        database=database,
        tables=schemas.get(database, ""),
        knowledge=str(row.get("evidence") or row.get("knowledge") or ""),
        gold_sql=text_of(row, ("SQL", "query", "sql", "gold_sql"), place),
    )
