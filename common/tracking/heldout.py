"""Held-out evaluations on disk: what the policy wrote for requests it never trained on, and what came of it.

A run keeps them in `runs/<name>/heldout/`: `start.json` (before the first step), `trained.json` (the final
policy), any number of `v<version>.json` in between, and `baselines.json` (baseline -> recall per request).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec

from common.statistics import Interval, bootstrap_interval
from common.tracking.jsonl import replace_file

_T = TypeVar("_T")


class HeldoutRow(msgspec.Struct, frozen=True):
    """One request.

    Attributes:
        id: of the request.
        request: what the user asked for.
        text: the policy's whole response.
        query: the query in it; None where it could not be parsed.
        recall: share of the relevant documents found, in [0, 1].
        relevant: number of relevant documents, or their ids.
        hits: number of relevant documents found, or their ids.
    """

    id: str
    request: str
    text: str
    query: str | None
    recall: float
    relevant: int | list[str]
    hits: int | list[str]


class HeldoutResult(msgspec.Struct, frozen=True):
    """All held-out requests under one policy version."""

    version: int
    rows: list[HeldoutRow]

    @property
    def recalls(self) -> list[float]:
        """Recall per request, in the order of `rows`."""
        return [row.recall for row in self.rows]

    def interval(self) -> Interval:
        """Mean recall with its 95 % bootstrap interval. Raises ValueError where there are no rows."""
        return bootstrap_interval(self.recalls)


@dataclass(frozen=True)
class Evaluation:
    """Everything measured on the held-out requests of a run.

    Attributes:
        start, trained: the policy before the first step and at the end; None where not measured.
        history: all evaluations by version, oldest first, start and trained among them.
        baselines: recall per request of each fixed baseline.
    """

    start: HeldoutResult | None = None
    trained: HeldoutResult | None = None
    history: tuple[HeldoutResult, ...] = ()
    baselines: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def shown_baselines(self) -> dict[str, Interval]:
        """Each baseline; of `rarest_1`, `rarest_2`, … only the best, the smallest k on ties."""
        means = {name: bootstrap_interval(recalls) for name, recalls in self.baselines.items()}
        rarest = sorted(name for name in means if name.startswith("rarest"))
        best = max(rarest, key=lambda name: means[name].mean, default=None)
        return {name: interval for name, interval in means.items() if name == best or name not in rarest}


def read_heldout(path: str | Path) -> HeldoutResult:
    """One evaluation. Raises FileNotFoundError, or ValueError naming the file and what is wrong in it."""
    return _decode(path, HeldoutResult)


def write_heldout(path: str | Path, result: HeldoutResult) -> None:
    """Write one evaluation, replacing the file in one step. Raises OSError."""
    replace_file(path, msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")


def write_baselines(path: str | Path, recalls: Mapping[str, Sequence[float]]) -> None:
    """Write the recall per request of each baseline. Raises OSError."""
    plain = {name: [float(value) for value in values] for name, values in recalls.items()}
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
