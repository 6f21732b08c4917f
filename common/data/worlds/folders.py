"""How worlds are written: whole or not at all, the same bytes for the same content."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec

from common.data.rows import ROWS_FOLDER
from common.tasks.row import Row


@contextlib.contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `folder` at the end; nothing is left where writing failed."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield partial
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Text lines, ended as on every system alike; missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{line}\n" for line in lines)


def write_json_lines(path: Path, objects: Iterable[object]) -> None:
    """One JSON object a line."""
    write_lines(path, map(json.dumps, objects))


def write_rows(folder: Path, split: str, rows: Sequence[Row]) -> None:
    """The requests of a split, as `common.data.rows` reads them."""
    lines = (msgspec.json.encode(row).decode() for row in rows)
    write_lines(folder / ROWS_FOLDER / f"{split}.jsonl", lines)
