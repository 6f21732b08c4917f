"""A comparison for people: rows of methods and columns of datasets, as the paper's tables have them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Final

from deploy.evaluation.compare import Dataset, rows_of
from deploy.evaluation.results import Figure
from deploy.evaluation.table import figure_cell, signed_cell, table_row

UNFINISHED: Final = "unfinished"
PARTIAL: Final = "†"
_NONE: Final = "–"

_Cell = Callable[[Dataset, str, str], str]  # of a dataset, a row and a metric


def comparison(datasets: Sequence[Dataset], against: str | None) -> str:
    """The whole comparison in Markdown. against: the row that all others are compared with; None: none is."""
    rows = rows_of(datasets)
    lines = ["# Comparison", "", "Means over requests with 95 % bootstrap intervals; bold: the best of a column.", ""]
    lines += _table(datasets, rows, "method", _mean_cell)
    if against is not None and len(rows) > 1:
        others = [label for label in rows if label != against]
        lines += ["", f"Each minus {against}, over the requests that count for both (* the interval leaves out 0):", ""]
        lines += _table(datasets, others, "method", partial(_difference_cell, against))
    notes = [note for dataset in datasets for note in _notes(dataset)]
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"


def _table(datasets: Sequence[Dataset], rows: Sequence[str], corner: str, cell: _Cell) -> list[str]:
    columns = [(dataset, metric) for dataset in datasets for metric in dataset.metrics]
    heads = [corner, *(f"{dataset.heading}: {metric}" for dataset, metric in columns)]
    lines = [table_row(map(escaped, heads)), table_row(["---", *["---:"] * len(columns)])]
    lines += [table_row([escaped(row), *(cell(dataset, row, metric) for dataset, metric in columns)]) for row in rows]
    return lines


def _mean_cell(dataset: Dataset, row: str, metric: str) -> str:
    if row not in dataset.entries:
        return _NONE
    if dataset.entries[row].method is None:
        return UNFINISHED
    text = figure_cell(dataset.figure(row, metric))
    if row in dataset.best(metric):
        mean, _, interval = text.partition(" ")
        return f"**{mean}** {interval}"
    return text if dataset.whole(row) else f"{text} {PARTIAL}"


def _difference_cell(against: str, dataset: Dataset, row: str, metric: str) -> str:
    figure: Figure | None = dataset.difference(row, against, metric)
    few = figure is not None and figure.queries < dataset.requests
    return f"{signed_cell(figure)} {PARTIAL}" if few else signed_cell(figure)


def _notes(dataset: Dataset) -> Iterable[str]:
    for row, entry in dataset.entries.items():
        where = f"* {row}, {dataset.heading}: "
        if entry.method is None:
            yield f"{where}{UNFINISHED}, {entry.requests} requests so far: run its eval command again ({entry.path})."
        elif not dataset.whole(row):
            why = [f"{count} {reason.replace('_', ' ')}" for reason, count in entry.method.apart.items()]
            missing = f"; in no figure: {', '.join(why)}" if why else ""
            yield f"{where}{PARTIAL} {entry.counted} of {dataset.requests} requests{missing}."


def escaped(text: object) -> str:
    """A name in a cell: a pipe would end it."""
    return str(text).replace("|", "\\|")
