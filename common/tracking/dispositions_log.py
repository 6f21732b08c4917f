"""dispositions.jsonl: what became of every prompt position, one line each, for the audit of a run.

A position that has no line is outstanding; no position ever has two. A checkpoint notes how many lines there are
at its moment; whoever goes on from it cuts the file back to that length, so that the file always tells the story of
the weights that survived.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.tracking.jsonl import JsonlFile, read_jsonl

TRAINED = "trained"


class DispositionsLog:
    """Appends lines; `lines` counts them, those of earlier learners of the run included."""

    def __init__(self, path: str | Path, keep: int) -> None:
        """Open the log and cut it back to `keep` lines.

        Raises:
            ValueError: it has fewer lines. OSError: it cannot be written.
        """
        self._file = JsonlFile(path)
        self._file.keep_first(keep)
        self.lines = keep

    def record(self, ticket: int, prompt_id: str, disposition: str, version: int) -> None:
        """One position has ended: `trained`, or set aside by a named rule, at a policy version. Raises OSError."""
        self._file.append({"ticket": ticket, "prompt_id": prompt_id, "disposition": disposition, "version": version})
        self.lines += 1

    def sync(self) -> None:
        """Force the lines onto the disk."""
        self._file.sync()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()


def read_dispositions(path: str | Path) -> list[dict[str, Any]]:
    """All lines. Raises FileNotFoundError, or ValueError naming a broken line."""
    return read_jsonl(path)
