"""The picture of `benchmarks.staleness`: recall, seconds per step and age of the tokens by bound, one line per loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from deploy.plots import BLUE, GREEN, PALE, QUIET, VERMILION

STYLES = {"decoupled": (BLUE, "o"), "tis": (GREEN, "s"), "uncorrected": (VERMILION, "^")}
APART = 0.09  # of two losses at one bound, so that their intervals do not hide each other


def draw_rows(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the rows of `benchmarks.staleness.summarize` into a PNG. Raises OSError."""
    bounds = sorted({row["max_staleness"] for row in rows})
    figure = Figure(figsize=(13.0, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    recall, seconds, age = figure.subplots(1, 3)
    for number, (loss, (color, marker)) in enumerate(STYLES.items()):
        own = sorted((row for row in rows if row["loss"] == loss), key=lambda row: row["max_staleness"])
        if not own:
            continue
        at = [bounds.index(row["max_staleness"]) + APART * (number - 1) for row in own]
        values = [row["recall"] for row in own]
        below = [row["recall"] - row["ci95"][0] for row in own]
        above = [row["ci95"][1] - row["recall"] for row in own]
        recall.errorbar(at, values, [below, above], color=color, marker=marker, capsize=3, linewidth=1.8, label=loss)
        seconds.plot(at, [row["step_s"] for row in own], color=color, marker=marker, linewidth=1.8)
        age.plot(at, [row["staleness_token"] for row in own], color=color, marker=marker, linewidth=1.8)
        age.plot(at, [row["staleness_oldest"] for row in own], color=color, marker=marker, linewidth=1.0, linestyle=":")
    start = [row["recall_start"] for row in rows]
    recall.axhline(sum(start) / len(start), color=QUIET, linestyle=(0, (5, 3)), linewidth=1.2, label="before training")
    age.plot(range(len(bounds)), bounds, color=QUIET, linestyle=(0, (5, 3)), linewidth=1.2)
    _finish(recall, bounds, "Held-out recall, 95 % interval over requests")
    _finish(seconds, bounds, "Seconds per step")
    _finish(age, bounds, "Age of trained tokens (versions)")
    age.set_ylabel("solid: mean, dotted: oldest, dashed: bound")
    recall.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _finish(axes: Axes, bounds: Sequence[int], title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xticks(range(len(bounds)), [str(bound) for bound in bounds])
    axes.set_xlabel("max_staleness (policy versions)")
    axes.set_xlim(-0.3, len(bounds) - 0.7)
    axes.set_ylim(bottom=0.0)
    axes.grid(axis="y", color=PALE, linewidth=0.8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
