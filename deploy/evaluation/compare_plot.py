"""A comparison as a picture: a panel for each column, a bar with its interval for each row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.evaluation.compare import BASELINE_ROWS, Dataset, rows_of
from deploy.evaluation.compare_table import PARTIAL, UNFINISHED
from deploy.plots import BLUE, INK, PALE, QUIET, blank_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PANEL_INCHES, _BAR_INCHES, _MARGIN_INCHES, _DPI = 5.0, 0.42, 1.3, 150
_GREY = "#B3B3B3"  # light enough for the interval on it


def write_comparison_plot(datasets: Sequence[Dataset], file: Path) -> None:
    """Draw every column of a comparison. Baselines are grey; a bar over fewer requests than others is hatched.

    Raises:
        ImportError: matplotlib is not installed. OSError: the file cannot be written.
    """
    rows = rows_of(datasets)
    columns = [(dataset, metric) for dataset in datasets for metric in dataset.metrics]
    height = _MARGIN_INCHES + _BAR_INCHES * len(rows)
    figure, panels = blank_figure(1, len(columns), (_PANEL_INCHES * len(columns), height))
    for axes, (dataset, metric) in zip(panels, columns, strict=True):
        _draw(axes, dataset, metric, rows)
    figure.savefig(file, dpi=_DPI)


def _draw(axes: Axes, dataset: Dataset, metric: str, rows: Sequence[str]) -> None:
    for place, row in enumerate(rows):
        figure = dataset.figure(row, metric)
        if figure is None:
            missing = UNFINISHED if row in dataset.entries else "–"
            axes.text(0.0, place, f" {missing}", va="center", fontsize=10, color=QUIET)
            continue
        whole = dataset.whole(row)
        color = _GREY if row in BASELINE_ROWS else BLUE
        axes.barh(place, figure.mean, height=0.66, color=color, hatch=None if whole else "//", edgecolor="white")
        axes.hlines(place, figure.low, figure.high, color=INK, linewidth=1.4)
        text = f" {figure.mean:.3f}{'' if whole else f' {PARTIAL}'}"
        axes.text(max(figure.high, figure.mean), place, text, va="center", fontsize=10, color=INK)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.4, -0.6)  # the first row on top
    axes.set_xlim(left=0.0)
    axes.margins(x=0.2)
    _dress(axes, f"{dataset.heading}: {metric}")


def _dress(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK)
    axes.set_xlabel("mean and 95 % interval", fontsize=10, color=QUIET)
    axes.tick_params(labelsize=10, colors=QUIET, length=0)
    axes.grid(axis="x", color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.spines["left"].set_color(PALE)
