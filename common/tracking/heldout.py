"""Held-out evaluations on disk: what the policy wrote for requests it never trained on, and what came of it.

A run keeps them in `runs/<name>/heldout/`: `start.json` (before the first step), `trained.json` (the final
policy), any number of `v<version>.json` in between, and `baselines.json` (baseline -> the task's metric per request).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec

from common.statistics import Interval, bootstrap_interval
from common.tracking.jsonl import replace_file

RECALL = "recall"

_T = TypeVar("_T")


class HeldoutRow(msgspec.Struct, frozen=True):
    """One request.

    Attributes:
        id: of the request.
        request: what the user asked for.
        text: the policy's whole response.
        query: the query in it; None where it could not be parsed.
        value: of the task's metric; 0 where the answer is invalid.
        relevant: number of relevant documents, or their ids; None for a task without.
        hits: number of relevant documents found, or their ids; None where the metric does not tell.
    """

    id: str
    request: str
    text: str
    query: str | None
    value: float
    relevant: int | list[str] | None = None
    hits: int | list[str] | None = None


class HeldoutResult(msgspec.Struct, frozen=True):
    """All held-out requests under one policy version; metric: what the values of the rows are."""

    version: int
    rows: list[HeldoutRow]
    metric: str = RECALL

    @property
    def values(self) -> list[float]:
        """The metric per request, in the order of `rows`."""
        return [row.value for row in self.rows]

    @property
    def metric_key(self) -> str:
        """Under which metrics.jsonl and W&B hold the mean."""
        return heldout_key(self.metric)

    def interval(self) -> Interval:
        """The mean with its 95 % bootstrap interval. Raises ValueError where there are no rows."""
        return bootstrap_interval(self.values)


@dataclass(frozen=True)
class Evaluation:
    """Everything measured on the held-out requests of a run.

    Attributes:
        start, trained: the policy before the first step and at the end; None where not measured.
        history: all evaluations by version, oldest first, start and trained among them.
        baselines: the metric per request of each fixed baseline.
    """

    start: HeldoutResult | None = None
    trained: HeldoutResult | None = None
    history: tuple[HeldoutResult, ...] = ()
    baselines: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @property
    def metric(self) -> str:
        """What all values here are."""
        return self.history[-1].metric if self.history else RECALL

    def shown_baselines(self) -> dict[str, Interval]:
        """Each baseline; of `rarest_1`, `rarest_2`, … only the best, the smallest k on ties."""
        means = {name: bootstrap_interval(values) for name, values in self.baselines.items()}
        rarest = sorted(name for name in means if name.startswith("rarest"))
        best = max(rarest, key=lambda name: means[name].mean, default=None)
        return {name: interval for name, interval in means.items() if name == best or name not in rarest}


def heldout_key(metric: str) -> str:
    """Under which metrics.jsonl and W&B hold the mean of a metric over the held-out requests."""
    return f"{metric}/heldout"


def read_heldout(path: str | Path) -> HeldoutResult:
    """One evaluation. Raises FileNotFoundError, or ValueError naming the file and what is wrong in it."""
    return _decode(path, HeldoutResult)


def write_heldout(path: str | Path, result: HeldoutResult) -> None:
    """Write one evaluation, replacing the file in one step. Raises OSError."""
    replace_file(path, msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")


def write_baselines(path: str | Path, measured: Mapping[str, Sequence[float]]) -> None:
    """Write the metric per request of each baseline. Raises OSError."""
    plain = {name: [float(value) for value in values] for name, values in measured.items()}
    replace_file(path, msgspec.json.encode(plain) + b"\n")


def read_evaluation(folder: str | Path) -> Evaluation:
    """What `runs/<name>/heldout` holds; nothing where the folder is missing or empty.

    Raises:
        ValueError: a file is broken; the message names it.
    """
    base = Path(folder)
    versions = {path.stem: read_heldout(path) for path in sorted(base.glob("v*.json"))}
    ends = {name: _read_if_there(base / f"{name}.json") for name in ("start", "trained")}
    results = [*versions.values(), *(result for result in ends.values() if result is not None)]
    by_version = {result.version: result for result in results}
    baselines = base / "baselines.json"
    return Evaluation(
        start=ends["start"],
        trained=ends["trained"],
        history=tuple(by_version[version] for version in sorted(by_version)),
        baselines=_decode(baselines, dict[str, list[float]]) if baselines.exists() else {},
    )


def _read_if_there(path: Path) -> HeldoutResult | None:
    return read_heldout(path) if path.exists() else None


def _decode(path: str | Path, form: type[_T]) -> _T:
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=form)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}; evaluate again to replace it") from error
