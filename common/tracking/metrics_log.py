"""metrics.jsonl: the durable record of every step, from which each curve and figure of a run is drawn."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.tracking.jsonl import JsonlFile, read_jsonl

Metrics = dict[str, Any]


class MetricsLog:
    """Append one line of metrics per step.

    Args:
        path: the file; made where it is missing, continued where it exists.
        clock: seconds since the epoch, written as `time` into each line.
    """

    def __init__(self, path: str | Path, clock: Callable[[], float] = time.time) -> None:
        self._file = JsonlFile(path)
        self._clock = clock
        self.path = self._file.path
        self.last_step = max((int(line["step"]) for line in read_jsonl(self.path)), default=-1)

    def log(self, step: int, metrics: Mapping[str, object]) -> None:
        """Write the metrics of `step`; a second line for the same step adds to the first (`read_metrics`).

        Raises:
            ValueError: `step` lies before the last one written: the run was resumed without `resume_at`.
            OSError: the line could not be written; the file is as it was before.
        """
        if step < self.last_step:
            raise ValueError(
                f"step {step} after step {self.last_step} in {self.path}: call resume_at({step - 1}) when resuming"
            )
        self._file.append({"step": step, "time": round(self._clock(), 3), **_without(metrics, "step")})
        self.last_step = step

    def resume_at(self, step: int) -> int:
        """Cut off what was logged after `step`, so that steps done again are not counted twice.

        Returns:
            The number of lines cut off.
        """
        cut = self._file.keep(lambda line: int(line["step"]) <= step)
        self.last_step = max((int(line["step"]) for line in read_jsonl(self.path)), default=-1)
        return cut

    def sync(self) -> None:
        """Force the file onto the disk (call it with each checkpoint)."""
        self._file.sync()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()


def read_metrics(path: str | Path) -> list[Metrics]:
    """One dict per step, in order; lines of the same step are merged, the later value winning.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line before the last is broken; the message names it.
    """
    return merge_steps(read_jsonl(path))


def merge_steps(lines: list[Metrics]) -> list[Metrics]:
    """Join the lines of each step into one dict, ordered by step."""
    steps: dict[int, Metrics] = {}
    for line in lines:
        steps.setdefault(int(line["step"]), {}).update(line)
    return [steps[step] for step in sorted(steps)]


def series(metrics: Sequence[Metrics], name: str) -> list[tuple[int, float]]:
    """The points (step, value) of one metric; steps without a finite value of it are left out."""
    return [(int(line["step"]), float(line[name])) for line in metrics if line.get(name) is not None]


def _without(metrics: Mapping[str, object], name: str) -> dict[str, object]:
    return {key: value for key, value in metrics.items() if key != name}
