"""The ids of an index by position, in two mapped files: a Python list of them would not fit for tens of millions."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

_ENDS, _BYTES = "ids.ends", "ids.utf8"


def write_ids(folder: Path, ids: Iterable[str]) -> int:
    """Write the table into a folder; return how many ids there are."""
    ends: list[np.ndarray] = []
    block: list[int] = []
    position = count = 0
    with (folder / _BYTES).open("wb") as file:
        for document in ids:
            encoded = document.encode()
            file.write(encoded)
            position += len(encoded)
            count += 1
            block.append(position)
            if len(block) == 1 << 16:
                ends.append(np.array(block, dtype=np.uint64))
                block = []
    np.concatenate([*ends, np.array(block, dtype=np.uint64)]).tofile(folder / _ENDS)
    return count


class IdTable:
    """Opens what `write_ids` wrote."""

    def __init__(self, folder: Path) -> None:
        self._ends = np.memmap(folder / _ENDS, dtype=np.uint64, mode="r")
        with (folder / _BYTES).open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self._ends)

    def at(self, positions: Sequence[int]) -> tuple[str, ...]:
        """The ids at these positions."""
        places = np.asarray(positions, dtype=np.int64)
        ends = self._ends[places].tolist()
        begins = np.where(places > 0, self._ends[places - 1], 0).tolist()
        data = self._bytes
        return tuple(data[begin:end].decode() for begin, end in zip(begins, ends, strict=True))
