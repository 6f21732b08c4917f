"""How much one query may take."""

from __future__ import annotations

import math

import msgspec

_MIB = 1 << 20


class SqlLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Limits of one query and of the process that runs it.

    deadline_s: seconds of wall time for a query (30 as in BIRD's evaluator), not counting the wait for a worker.
    max_rows, max_bytes: a result beyond either comes back truncated. max_cell_bytes: longest text, blob or row SQLite
    may make, also in between. max_columns: of a result. max_sql_bytes: of a query. heap_mb: MiB for SQLite itself.
    memory_mb: MiB of address space of a worker, results included. stalled_share: a query whose process got less than
    this share of its deadline as processor time was not slow, its machine was. Raises ValueError for limits that
    nothing could run under.
    """

    deadline_s: float = 30.0
    max_rows: int = 100_000
    max_bytes: int = 16 * _MIB
    max_cell_bytes: int = 2_000_000
    max_columns: int = 500
    max_sql_bytes: int = 100_000
    heap_mb: int = 256
    memory_mb: int = 512
    stalled_share: float = 0.1

    def __post_init__(self) -> None:
        require_seconds("deadline_s", self.deadline_s)
        counts = (self.max_rows, self.max_bytes, self.max_cell_bytes, self.max_columns, self.max_sql_bytes)
        if min(counts) < 1 or self.heap_mb < 8:
            raise ValueError("SQL limits must be positive, and heap_mb at least 8")
        if self.memory_mb < self.heap_mb + 128:
            raise ValueError(f"memory_mb must exceed heap_mb by 128 or more, got {self.memory_mb} and {self.heap_mb}")
        if not 0.0 <= self.stalled_share < 1.0:
            raise ValueError(f"stalled_share must be within [0, 1), got {self.stalled_share}")

    @property
    def max_frame_bytes(self) -> int:
        """Longest answer of a worker: a character takes up to four bytes, a column's name up to a kilobyte."""
        return 4 * self.max_bytes + 1024 * self.max_columns + _MIB


def require_seconds(name: str, value: float) -> None:
    """Raise ValueError unless value is a positive, finite number of seconds."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a positive number of seconds, got {value}")
