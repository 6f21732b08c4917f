"""Finding and reading the files of a raw folder, whatever their packing."""

from __future__ import annotations

import gzip
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.data.beir import DataError
from common.data.splits import same_request
from common.tasks.row import Row

Splits = dict[str, list[Row]]
"""Name of a split -> its rows."""

# Words of a file's name that say which part of a set it is. `val` is a word of the original's own: see `roles`.
_PARTS = {"train": "train", "dev": "dev", "validation": "dev", "val": "val", "test": "test"}


@dataclass
class RawSet:
    """What a reader found.

    splits: rows by split. corpus: a `corpus.jsonl`. databases: SQLite file by name. left_out: reason -> number of rows
    that were no use. repeated: rows of a split that another of its files holds too.
    """

    splits: Splits = field(default_factory=dict)
    corpus: Path | None = None
    databases: dict[str, Path] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    repeated: dict[str, int] = field(default_factory=dict)

    def add(self, split: str, rows: Iterable[Row]) -> None:
        """Rows of one more file of a split; those that an earlier file holds are not added again."""
        there = self.splits.setdefault(split, [])
        known = {(*same_request(row), row.gold_sql) for row in there}
        for row in rows:
            if (*same_request(row), row.gold_sql) in known:
                self.repeated[split] = self.repeated.get(split, 0) + 1
            else:
                there.append(row)

    def leave_out(self, reason: str, rows: int) -> None:
        """Count rows that were no use."""
        if rows:
            self.left_out[reason] = self.left_out.get(reason, 0) + rows


def files_below(folder: Path, *suffixes: str) -> list[Path]:
    """Files whose names end so, plain or .gz, in the order of their paths; hidden folders are not looked into."""
    wanted = (*suffixes, *(f"{suffix}.gz" for suffix in suffixes))
    return sorted(
        path
        for path in folder.rglob("*")
        if path.name.endswith(wanted)
        and path.is_file()
        and not any(p[0] == "." for p in path.relative_to(folder).parts)
    )


def split_of(path: Path, roles: Mapping[str, str]) -> str | None:
    """The split a file belongs to, by the first word of its name that says so; None where no word does.

    roles: what a part of this set stands for here, where that is not its own name: {"val": "test"} where the published
    `val` was cut from test, "" where it must not be used.
    """
    for word in re.split(r"[^a-z]+", path.name.lower()):
        if word in _PARTS:
            part = _PARTS[word]
            return roles.get(part, "dev" if part == "val" else part) or None
    return None


def open_text(path: Path) -> io.TextIOBase:
    """A text file, unpacked on the way where it is .gz."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open("r", encoding="utf-8-sig", newline="")


def json_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place for messages, object) of a .jsonl file or of a .json file that holds one list.

    Raises:
        DataError: the file is not what its name says.
    """
    try:
        with open_text(path) as file:
            if ".jsonl" in path.name:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield _object(json.loads(line), f"{path.name} line {number}")
            else:
                for number, value in enumerate(json.load(file), start=1):
                    yield _object(value, f"{path.name} entry {number}")
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, EOFError, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}): download it again or mend it") from None


def _object(value: Any, place: str) -> tuple[str, dict[str, Any]]:
    if not isinstance(value, dict):
        raise DataError(f"{place}: not a JSON object: fix or remove it")
    return place, value


def text_of(row: Mapping[str, Any], keys: Iterable[str], place: str) -> str:
    """The first of the keys that holds text. Raises DataError."""
    keys = tuple(keys)
    for key in keys:
        value = row.get(key)
        if isinstance(value, str) and value.strip():
            return value
    raise DataError(f"{place}: none of the keys {', '.join(keys)} holds text: is this the right file?")


def texts_of(row: Mapping[str, Any], keys: Iterable[str]) -> tuple[str, ...]:
    """The list under the first of the keys that is there, each text once; one text counts as a list; () if none is."""
    for key in keys:
        value = row.get(key)
        if value is None:
            continue
        values = value if isinstance(value, list | tuple) else [value]
        return tuple(dict.fromkeys(str(each) for each in values if str(each).strip()))
    return ()
