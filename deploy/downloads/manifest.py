"""What was fetched into a raw folder, and how anybody can check it: manifest.json."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec

from common.data.beir import DataError

MANIFEST_FILE: Final = "manifest.json"
_BLOCK: Final = 1 << 20


class DownloadError(DataError):
    """A file cannot be fetched, or is not what it should be. One line that says what to do."""


class Fetched(msgspec.Struct, frozen=True):
    """One file. source: URL, or repository@commit. etag: of the server. checked: the published checksum it was held to,
    "" where there is none. unpacked: it was an archive, and is gone; its files lie beside it.
    """

    source: str
    bytes: int
    sha256: str
    etag: str = ""
    checked: str = ""
    unpacked: bool = False


class Manifest:
    """The manifest of a raw folder: path below it -> what is known of the file."""

    def __init__(self, folder: Path) -> None:
        """Raises DownloadError where the file there is no manifest."""
        self.folder = folder
        self.path = folder / MANIFEST_FILE
        self.files: dict[str, Fetched] = {}
        if self.path.is_file():
            try:
                self.files = msgspec.json.decode(self.path.read_bytes(), type=dict[str, Fetched])
            except msgspec.DecodeError as error:
                raise DownloadError(f"{self.path} is damaged ({error}): remove it, and what it lists") from None

    def holds(self, name: str, source: str) -> bool:
        """Whether a file of this source was fetched and is still there, by its size; or was unpacked."""
        known = self.files.get(name)
        if known is None or known.source != source:
            return False
        path = self.folder / name
        return known.unpacked or (path.is_file() and path.stat().st_size == known.bytes)

    def note(self, name: str, fetched: Fetched) -> None:
        """Add or replace one file; written at once, whole or not at all."""
        self.files[name] = fetched
        unfinished = self.path.with_suffix(".unfinished")
        unfinished.write_bytes(msgspec.json.format(msgspec.json.encode(self.files), indent=1) + b"\n")
        unfinished.replace(self.path)


def digests(path: Path, names: Iterable[str], prefix: bytes = b"") -> dict[str, str]:
    """Hexadecimal digests of a file under several algorithms, in one pass. prefix: bytes counted before its own."""
    hashes = {name: hashlib.new(name, prefix, usedforsecurity=False) for name in names}
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            for each in hashes.values():
                each.update(block)
    return {name: each.hexdigest() for name, each in hashes.items()}
