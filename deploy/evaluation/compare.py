"""Finished evaluations side by side: what may stand in one column, and whose row is whose."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from deploy.errors import LaunchError
from deploy.evaluation.records import EvaluationFolder, Identity, QueryRecord, read_records
from deploy.evaluation.results import Figure, MethodResults, Results, differences
from deploy.evaluation.table import shown_methods
from deploy.plots import baseline_label

# In the order of a table. An evaluation of `--model none` calls itself as its baseline would be called.
BASELINE_ROWS: Final = tuple(
    map(baseline_label, ("original", "and_all", "or_all", "rarest", "rarest_words", "pico_or", "rm3"))
)


@dataclass(frozen=True)
class Evaluation:
    """A folder that `deepretrieval eval` has written in.

    label: of its model's row. results: None where it was never finished.
    """

    folder: EvaluationFolder
    label: str
    identity: Identity
    results: Results | None


@dataclass(frozen=True)
class Entry:
    """What one method achieved on one dataset.

    Attributes:
        path: of its records.
        records: of the requests that are done.
        method: None where the evaluation is not finished: its means so far are those of other requests.
        requests: that are done, counted or not.
    """

    path: Path
    records: Sequence[QueryRecord]
    method: MethodResults | None

    @property
    def requests(self) -> int:
        return len(self.records)

    @property
    def counted(self) -> int:
        """Requests that its figures are means of."""
        return 0 if self.method is None else self.method.queries


@dataclass
class Dataset:
    """What is measured on the same requests by the same engine: one column for each metric.

    Attributes:
        heading: dataset, split and engine, and the task where that is needed to tell it from another.
        first: the evaluation that all others must fit.
        metrics: those shown, the task's own unless others are asked for.
        measured: all of which more is better, by any of the evaluations.
        entries: row -> method.
    """

    heading: str
    first: Evaluation
    metrics: list[str] = field(default_factory=list)
    measured: dict[str, None] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)

    @property
    def requests(self) -> int:
        """That the most complete method is done with."""
        return max((entry.requests for entry in self.entries.values()), default=0)

    def figure(self, label: str, metric: str) -> Figure | None:
        """A row's figure; None where it has none."""
        entry = self.entries.get(label)
        return None if entry is None or entry.method is None else entry.method.metrics.get(metric)

    def whole(self, label: str) -> bool:
        """Whether a row's figures are of all requests."""
        return label in self.entries and self.entries[label].counted == self.requests

    def best(self, metric: str) -> set[str]:
        """The rows with the highest mean, of those that are of all requests."""
        means = {
            label: found.mean
            for label in self.entries
            if self.whole(label) and (found := self.figure(label, metric)) is not None
        }
        return {label for label, mean in means.items() if mean == max(means.values())}

    def difference(self, label: str, against: str, metric: str) -> Figure | None:
        """A row minus another, paired over the requests that count for both; None where there are none."""
        mine, other = self.entries.get(label), self.entries.get(against)
        if mine is None or other is None or mine.method is None or other.method is None:
            return None
        return differences(mine.records, other.records, [metric]).get(metric)


def read_evaluation(path: Path, name: str | None) -> Evaluation:
    """The evaluation in a folder. name: of its model's row; None: as the evaluation calls it.

    Raises:
        LaunchError: there is none, or its files cannot be read.
    """
    folder = EvaluationFolder(path)
    identity = folder.identity()
    if not identity.comparable:
        raise LaunchError(f"{path} was written by an earlier version: run its eval command again, it has nothing to do")
    try:
        results = msgspec.json.decode(folder.results.read_bytes(), type=Results) if folder.results.is_file() else None
    except msgspec.DecodeError as error:
        raise LaunchError(f"{folder.results}: {error}: run its eval command again") from None
    drawn = identity.sampling
    several = f" ({drawn['samples']} at T {drawn['temperature']:g})" if drawn.get("temperature") else ""
    return Evaluation(folder, name or f"{identity.model}{several}", identity, results)


def datasets_of(evaluations: Sequence[Evaluation], metrics: Sequence[str] = ()) -> list[Dataset]:
    """All evaluations by what was measured, in the order in which they come.

    Raises:
        LaunchError: two that would share a column cannot be compared, or a row has two values for one; or nothing
            measured a metric that is asked for.
    """
    found: dict[tuple[str, str, str, str], Dataset] = {}
    for evaluation in evaluations:
        identity = evaluation.identity
        key = (identity.dataset, identity.split, identity.engine, identity.task)
        dataset = found.setdefault(key, Dataset(" ".join(key[:-1]), evaluation))
        _require_same(dataset, evaluation)
        _add(dataset, evaluation)
    datasets = list(found.values())
    for key, dataset in found.items():
        if sum(other[:-1] == key[:-1] for other in found) > 1:
            dataset.heading += f" {key[-1]}"
        dataset.metrics = _metrics(dataset, metrics)
    return datasets


def rows_of(datasets: Iterable[Dataset]) -> list[str]:
    """The rows of all datasets: baselines first, then models as they come."""
    labels = list(dict.fromkeys(label for dataset in datasets for label in dataset.entries))
    models = [label for label in labels if label not in BASELINE_ROWS]
    return [*(label for label in BASELINE_ROWS if label in labels), *models]


def _require_same(dataset: Dataset, evaluation: Evaluation) -> None:
    ours, theirs = dataset.first.identity.comparable, evaluation.identity.comparable
    differing = [part for part in theirs if ours.get(part) != theirs[part]]
    if differing:
        raise LaunchError(
            f"{dataset.first.folder.path} and {evaluation.folder.path} are both {dataset.heading}, but with another "
            f"{' and '.join(differing)}: they cannot share a column"
        )


def _add(dataset: Dataset, evaluation: Evaluation) -> None:
    folder, results = evaluation.folder, evaluation.results
    label = evaluation.label
    if label in dataset.entries and label not in BASELINE_ROWS:
        one = dataset.entries[label].path.parent
        raise LaunchError(
            f"{one} and {folder.path} are both {label} on {dataset.heading}: name their rows, as NAME={folder.path}"
        )
    if results is None:
        _put(dataset, label, folder.records_of(None), None)
        return
    dataset.measured |= dict.fromkeys(results.quality)
    for name, method in shown_methods(results).items():
        own = name == results.model
        _put(dataset, label if own else baseline_row(name), folder.records_of(None if own else name), method)


def _put(dataset: Dataset, label: str, path: Path, method: MethodResults | None) -> None:
    """Of a baseline that several evaluations have, the most complete one is kept."""
    records = read_records(path) if path.is_file() else []
    if method is not None and method.queries + sum(method.apart.values()) != len(records):
        method = None  # it is being gone on with
    entry = Entry(path, records, method)
    known = dataset.entries.get(label)
    if known is None or entry.counted > known.counted:
        dataset.entries[label] = entry


def baseline_row(name: str) -> str:
    """Of the k rarest words, results have many and tables the best: one row, whatever k was the best."""
    if name.startswith("rarest_"):
        return baseline_label("rarest_words" if name.endswith("_words") else "rarest")
    return baseline_label(name)


def _metrics(dataset: Dataset, wanted: Sequence[str]) -> list[str]:
    missing = [name for name in wanted if name not in dataset.measured]
    if missing and dataset.measured:  # else nothing there is finished
        raise LaunchError(
            f"nothing measured {missing[0]} on {dataset.heading}; measured: {', '.join(dataset.measured)}"
        )
    return list(wanted) or [dataset.first.identity.metric]
