"""API keys: from the environment, or from a file that only its owner may read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from rewarders.engines.base import EngineMisconfigured

HIDDEN: Final = b"<API key>"
_MAX_BYTES: Final = 4096
# Of NCBI's keys, which have 36 hexadecimal digits, none is as short, and none is a number.
_SHORTEST_HIDDEN: Final = 8


class ApiKeyError(EngineMisconfigured):
    """The file of a key cannot be used; the reason says what to do and never quotes what is in the file."""


def key_from_environment(variable: str | None) -> str:
    """The key, "" where the variable is unset, blank or not named at all."""
    return os.environ.get(variable, "").strip() if variable else ""


def key_from_file(path: str) -> str:
    """The one line of a file of mode 0600; `~` is the home folder.

    Raises:
        ApiKeyError: no such file, one that others may read, or one that holds something else than a key.
    """
    place = Path(path).expanduser()
    try:
        with place.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if mode & 0o077:
                raise ApiKeyError(f"{place} can be read by others: chmod 600 {place}")
            content = file.read(_MAX_BYTES)
    except OSError as error:
        raise ApiKeyError(f"cannot read the API key in {place}: {error.strerror}") from None
    key = content.decode("ascii", errors="replace").strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ApiKeyError(f"{place} must hold one API key on a line of its own, and nothing else")
    return key


def without_key(body: bytes, key: str) -> bytes:
    """The body of a reply in which `key` is replaced by `HIDDEN`: NCBI quotes it in some of its errors, and texts of
    replies reach logs, sample records and caches. A key that might be a document's id is left where it stands.
    """
    if len(key) < _SHORTEST_HIDDEN or key.isdigit():
        return body
    return body.replace(key.encode(), HIDDEN)
