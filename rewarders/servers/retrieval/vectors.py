"""The vectors of a corpus in a .npy file: encoded once, in blocks, so that an interrupted build goes on."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from rewarders.servers.index_cache import Progress
from rewarders.servers.retrieval.sealed import is_sealed, seal

BLOCK_ROWS: Final = 1024
"""Rows encoded and written at a time: the most that an interruption costs, and the most texts held."""

Encode = Callable[[Sequence[str]], NDArray[np.float32]]


def ensure_vectors(
    path: Path, rows: int, dimension: int, texts: Callable[[], Iterable[str]], encode: Encode, progress: Progress
) -> int:
    """See to it that `path` holds one vector per text: float32 [rows, dimension], in .npy format.

    The name of the file must stand for everything the vectors depend on. What an earlier, interrupted call has
    written is kept; block borders are fixed, so the result is the same. One process at a time may call this.

    Returns: rows encoded by this call, 0 if the file was there and whole.

    Raises:
        OSError: the file cannot be written.
    """
    if is_sealed(path) and _shape(path) == (rows, dimension):
        return 0
    unfinished = path.with_suffix(".unfinished")
    done = encoded_before = _whole_rows(unfinished, rows, dimension)
    remaining = itertools.islice(texts(), done, None)
    progress(done, rows)
    with unfinished.open("ab") as file:
        while block := list(itertools.islice(remaining, BLOCK_ROWS)):
            file.write(np.ascontiguousarray(encode(block), np.float32).tobytes())
            file.flush()
            os.fsync(file.fileno())
            done += len(block)
            progress(done, rows)
    if done != rows:
        raise OSError(f"{done} texts instead of {rows}: did the corpus change meanwhile? start again")
    seal(unfinished, path)
    return rows - encoded_before


def read_vectors(path: Path) -> NDArray[np.float32]:
    """Map the file into memory, read-only."""
    vectors: NDArray[np.float32] = np.lib.format.open_memmap(path, mode="r")  # unlike load, it knows no pickle
    return vectors


def _whole_rows(unfinished: Path, rows: int, dimension: int) -> int:
    """Cut an unfinished file after its last whole block, or begin one; return the rows it holds."""
    header = _header(rows, dimension)
    row_bytes = 4 * dimension
    with unfinished.open("ab+") as file:
        file.seek(0)
        if file.read(len(header)) != header:
            file.truncate(0)
            file.write(header)
            return 0
        there = (file.seek(0, os.SEEK_END) - len(header)) // row_bytes
        kept = rows if there >= rows else there - there % BLOCK_ROWS
        file.truncate(len(header) + kept * row_bytes)
        return kept


def _header(rows: int, dimension: int) -> bytes:
    """What stands before the numbers in a .npy file (format 1.0 of numpy.lib.format)."""
    buffer = BytesIO()
    description = {"descr": "<f4", "fortran_order": False, "shape": (rows, dimension)}
    np.lib.format.write_array_header_1_0(buffer, description)
    return buffer.getvalue()


def _shape(path: Path) -> tuple[int, ...] | None:
    try:
        return read_vectors(path).shape
    except (OSError, ValueError):
        return None
