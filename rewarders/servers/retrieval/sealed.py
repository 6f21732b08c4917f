"""Files of a cache that are trusted only if they are, byte for byte, what was written: each has a seal beside it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from common.data.beir import DataError

_SUFFIX = ".sha256"


def file_digest(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_sealed(path: Path) -> bool:
    """Whether the file is there and is what was sealed. It is read in full, about 1 s per GB."""
    try:
        return (path.parent / (path.name + _SUFFIX)).read_text() == file_digest(path)
    except (OSError, UnicodeDecodeError):
        return False


def seal(unfinished: Path, path: Path) -> None:
    """Give a complete file its name.

    The seal comes first: whoever is killed between the two leaves a seal that fits no file, which counts as no file.
    """
    with unfinished.open("rb+") as file:
        os.fsync(file.fileno())
    (path.parent / (path.name + _SUFFIX)).write_text(file_digest(unfinished))
    unfinished.replace(path)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a cache folder alone, over all processes of the host; the system frees it when its holder dies.

    Raises:
        DataError: nothing can be written there, now or inside the block.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        message = f"cannot use the cache of dense indexes in {folder}: {error}: free space or name another folder"
        raise DataError(message) from None
