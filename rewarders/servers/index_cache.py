"""Indexes in a cache folder: built once per content, atomically."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

from common.data.beir import DataError

Progress = Callable[[int, int], None]
"""Called with (entries done, entries in all) while an index is built."""


def default_cache_folder(service: str) -> Path:
    """The folder for a service's indexes where none is named: below `$XDG_CACHE_HOME`, or else `~/.cache`."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "deepretrieval" / service


def cached_index(folder: Path, name: str, build: Callable[[Path], None]) -> Path:
    """Path of the index `name`, which `build` writes to the path it is given if there is none yet.

    Raises:
        DataError: the index cannot be written, or whatever `build` says of the corpus.
    """
    path = folder / name
    if path.is_file():
        return path
    unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        build(unfinished)
        unfinished.replace(path)
    except (OSError, sqlite3.OperationalError) as error:
        raise DataError(
            f"cannot write the search index in {folder}: {error}: free space or name another folder"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
    return path


@contextlib.contextmanager
def opened_index(path: Path, name: str = "search index") -> Iterator[sqlite3.Connection]:
    """A connection to an index file that nobody writes, for any thread; it stays open afterwards.

    Raises:
        DataError: it is no database, or what is read inside the `with` is not there: the file is no usable `name`.
    """
    try:
        yield sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True, check_same_thread=False)
    except sqlite3.DatabaseError as error:
        raise DataError(f"{path} is no usable {name} ({error}): remove the file") from None


@contextlib.contextmanager
def unfinished_folder(path: Path) -> Iterator[Path]:
    """A new folder to fill, which becomes `path` at the end; it is gone if anything is raised meanwhile.

    Raises:
        DataError: the folder cannot be written.
    """
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        yield unfinished
        try:
            unfinished.replace(path)
        except OSError:
            if not path.is_dir():  # if it is one, another process was faster, and its folder holds the same
                raise
    except OSError as error:
        raise DataError(
            f"cannot write the search index in {path.parent}: {error}: free space or name another folder"
        ) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def content_digest(path: Path) -> tuple[str, int]:
    """SHA-256 and number of lines of a file.

    Raises:
        DataError: it cannot be read.
    """
    digest = hashlib.sha256()
    lines, last = 0, b"\n"
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
                lines += block.count(b"\n")
                last = block[-1:]
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): name a folder that holds {path.name}") from None
    return digest.hexdigest(), lines + (last != b"\n")
