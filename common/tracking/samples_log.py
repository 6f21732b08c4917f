"""samples.jsonl: what the policy wrote, what it was rewarded, and under which version, for reading by eye."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.tracking.jsonl import JsonlFile, read_jsonl


class SamplesLog:
    """Append one line per kept sample; the caller chooses how many (`tracking.samples_per_step`)."""

    def __init__(self, path: str | Path) -> None:
        self._file = JsonlFile(path)
        self.path = self._file.path

    def sample(self, step: int, **fields: object) -> None:
        """Write one sample, as a rule with `version, prompt_id, request, text, query, reward` and the task's metric.

        Raises:
            OSError: the line could not be written; the file is as it was before.
        """
        self._file.append({"step": step, **fields})

    def resume_at(self, step: int) -> int:
        """Cut off the samples of steps after `step`; returns how many."""
        return self._file.keep(lambda line: int(line["step"]) <= step)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()


def read_samples(path: str | Path) -> list[dict[str, Any]]:
    """All samples of a run. Raises FileNotFoundError, or ValueError naming a broken line."""
    return read_jsonl(path)
