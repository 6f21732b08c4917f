"""Messages between a pool and its worker processes: bytes with their length before them, over two pipes."""

from __future__ import annotations

import os
from typing import Final

LENGTH_BYTES: Final = 4


def frame(message: bytes) -> bytes:
    """Put the length in front."""
    return len(message).to_bytes(LENGTH_BYTES, "big") + message


def read_frame(descriptor: int) -> bytes | None:
    """Read one frame, blocking. None when the other side has closed the pipe."""
    header = _read_exactly(descriptor, LENGTH_BYTES)
    return None if header is None else _read_exactly(descriptor, int.from_bytes(header, "big"))


def write_all(descriptor: int, data: bytes) -> None:
    """Write everything, blocking."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _read_exactly(descriptor: int, wanted: int) -> bytes | None:
    parts = []
    while wanted:
        part = os.read(descriptor, wanted)
        if not part:
            return None
        parts.append(part)
        wanted -= len(part)
    return b"".join(parts)
