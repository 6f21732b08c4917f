"""An append-only file of JSON objects, one a line, that a crash or a full disk cannot spoil."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class JsonlFile:
    """Append JSON objects to `path`, each whole or not at all.

    A line that a crash tore apart is removed on opening (or completed, where only its line end is missing). A
    write that fails half-way (full disk) is taken back: the next line never runs into a torn one.

    Raises:
        OSError: the folder or the file cannot be written; `filename` names it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115 - open for the life of the run
        _repair_last_line(self._file.fileno(), self.path)

    def append(self, record: Mapping[str, object]) -> None:
        """Write one object and hand it to the operating system before returning.

        Raises:
            OSError: nothing was written (full disk, quota); the file still ends in a whole line.
            TypeError: a value has no JSON form.
        """
        line = encode_line(record)
        descriptor = self._file.fileno()
        end = os.fstat(descriptor).st_size
        try:
            written = os.write(descriptor, line)
            while written < len(line):
                written += os.write(descriptor, line[written:])
        except OSError as error:
            os.ftruncate(descriptor, end)
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> int:
        """Drop the lines that are not `wanted`; the file is replaced in one step. Returns how many went."""
        records = read_jsonl(self.path)
        kept = [record for record in records if wanted(record)]
        if len(kept) < len(records):
            replace_file(self.path, b"".join(encode_line(record) for record in kept))
            self._file.close()
            self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115
        return len(records) - len(kept)

    def keep_first(self, lines: int) -> int:
        """Drop what follows the first `lines` lines. Returns how many went.

        Raises:
            ValueError: the file has fewer lines.
        """
        content = self.path.read_bytes().splitlines(keepends=True)
        if len(content) < lines:
            raise ValueError(f"{self.path} has {len(content)} lines, {lines} were written: the end is missing")
        self._file.truncate(sum(map(len, content[:lines])))
        return len(content) - lines

    def sync(self) -> None:
        """Force what was written onto the disk, for the moment at which a checkpoint refers to it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def encode_line(record: Mapping[str, object]) -> bytes:
    """One JSON line. Numbers that are not finite become null: NaN is no JSON and would spoil every reader."""
    clean = {str(name): _plain(value) for name, value in record.items()}
    return (
        json.dumps(clean, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode(
            "utf-8",
            "backslashreplace",  # lone surrogates, which byte-level tokenizers can produce
        )
        + b"\n"
    )


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """All whole lines of `path`; an unfinished last line (a writer is at work, or was killed) is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line before the last is not a JSON object; the message names file and line.
    """
    lines = Path(path).read_bytes().split(b"\n")
    return parse_lines(lines[:-1], path)  # what follows the last line end is unfinished, or empty


def parse_lines(lines: Iterable[bytes], path: str | Path, first: int = 1) -> list[dict[str, Any]]:
    """The objects of whole `lines`, of which the first is line `first` of `path`; blank ones are skipped."""
    records = []
    for number, line in enumerate(lines, start=first):
        if not line.strip():
            continue
        record = _parse(line)
        if record is None:
            raise ValueError(f"{path}, line {number}: not a JSON object; delete that line or the file")
        records.append(record)
    return records


def replace_file(path: str | Path, content: bytes, durable: bool = True) -> None:
    """Put `content` in the place of `path`; a reader, or a crash, meets the old or the new file whole.

    `durable` waits for the disk, so that this also holds if the machine itself goes down.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{os.getpid()}.new")
    try:
        with open(draft, "wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)


def _repair_last_line(descriptor: int, path: Path) -> None:
    size = os.fstat(descriptor).st_size
    if size == 0 or os.pread(descriptor, 1, size - 1) == b"\n":
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if _parse(content[whole:]) is None:
        os.ftruncate(descriptor, whole)
    else:
        os.write(descriptor, b"\n")


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:  # includes UnicodeDecodeError: a line torn inside a character
        return None
    return record if isinstance(record, dict) else None


def _plain(value: object) -> object:
    """`value` in JSON's types; numpy and torch scalars and arrays go through `item` and `tolist`."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    convert = getattr(value, "tolist", None)  # numpy and torch: scalars become numbers, arrays lists
    if convert is None:
        raise TypeError(f"a value of type {type(value).__name__} has no JSON form")
    return _plain(convert())
