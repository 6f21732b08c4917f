"""Indexes in a cache folder: built once per content, atomically."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable
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
