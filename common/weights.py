"""The wire protocol of weight transfer: actors pull a version chunk by chunk from the learner.

A version is one safetensors file with Hugging Face names; its checksum is SHA-256 over the file's bytes. Pulling
needs no fixed set of peers: an actor that joins late or comes back is served like any other.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct

CHUNK_BYTES = 4 << 20
CHUNKS_IN_FLIGHT = 4

_Count = Annotated[int, Meta(ge=0, le=1 << 53)]


class ChunkRequest(Struct, frozen=True, tag="chunk_request", forbid_unknown_fields=True):
    """Bytes `offset` to `offset + CHUNK_BYTES` of `version`."""

    version: _Count
    offset: _Count


class Chunk(Struct, frozen=True, tag="chunk", forbid_unknown_fields=True):
    """The answer; the bytes follow in one payload frame. `total` is the size of the whole file."""

    version: _Count
    offset: _Count
    total: _Count


class VersionGone(Struct, frozen=True, tag="version_gone", forbid_unknown_fields=True):
    """The version asked for is no longer kept: pull `newest`."""

    version: _Count
    newest: _Count


FromWeightServer = Chunk | VersionGone


def file_checksum(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
