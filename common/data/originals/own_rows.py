"""A user's own set: JSON lines with two fields, {"text": …} and one of "relevant", "answers", "gold_sql".

Every other field of `common.tasks.row.Row` may be there too. Ids are made where a line has none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from common.data.beir import CORPUS_FILE, DataError
from common.data.originals.raw_files import RawSet, files_below, json_objects, split_of
from common.data.originals.sql_sets import databases_below, schema_of
from common.tasks.row import Row

JUDGMENTS: Final = ("relevant", "answers", "gold_sql")


def read_own_set(raw: Path, roles: Mapping[str, str]) -> RawSet:
    """One file, all of it the split `train` (parts of it become `dev` and `test`); or a folder of split files beside
    `corpus.jsonl` or databases.

    Raises:
        DataError: a line lacks its two fields, or a folder holds no file whose name says which split it is.
    """
    if raw.is_file():
        return RawSet({"train": list(_rows(raw, "own", {}))})
    found = RawSet(databases=databases_below(raw))
    schemas = {name: schema_of(path) for name, path in found.databases.items()}
    for path in files_below(raw, ".jsonl"):
        split = split_of(path, roles)
        if path.name == CORPUS_FILE:
            found.corpus = path
        elif split is not None:
            found.add(split, _rows(path, split, schemas))
    return found


def _rows(path: Path, prefix: str, schemas: Mapping[str, str]) -> Iterator[Row]:
    for number, (place, fields) in enumerate(json_objects(path), start=1):
        yield _row(fields, f"{prefix}-{number}", schemas, place)


def _row(fields: dict[str, Any], number: str, schemas: Mapping[str, str], place: str) -> Row:
    if not any(fields.get(name) for name in JUDGMENTS):
        raise DataError(f"{place}: give it one of {', '.join(JUDGMENTS)}, by which its answers are judged")
    return typed_row(fields, number, schemas, place)


def typed_row(fields: Mapping[str, Any], number: str, schemas: Mapping[str, str], place: str) -> Row:
    """The row of a user's JSON object. Raises DataError for a field that is none of a row's, or of another type.

    number: its id where it has none. schemas: tables of databases by name. place: where it stands, for messages.
    """
    given: dict[str, Any] = {"id": number, **fields}
    for name in ("relevant", "answers"):
        if isinstance(given.get(name), str | int):
            given[name] = [given[name]]
    if given.get("gold_sql") and not given.get("tables"):
        given["tables"] = schemas.get(str(given.get("database", "")), "")
    # Numbered documents and rows are as good as named ones.
    given["id"] = str(given["id"])
    if isinstance(given.get("relevant"), list):
        given["relevant"] = [str(each) for each in given["relevant"]]
    try:
        return msgspec.convert(given, Row)
    except (msgspec.ValidationError, ValueError) as error:
        raise DataError(f"{place}: {error}: the fields are text, and relevant, answers or gold_sql") from None
