"""The curves of a run as PNG files, drawn from metrics.jsonl and the held-out results (needs matplotlib)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from common.tracking.heldout import Evaluation, heldout_key
from common.tracking.metrics_log import Metrics, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

# Okabe and Ito (2008), "Color universal design": told apart under every common colour blindness.
BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#AA4499"
INK, QUIET, PALE = "#222222", "#6B6B6B", "#D9D9D9"
_SIZE_INCHES, _DPI = (8.0, 4.5), 150
_SMOOTH_SHARE = 0.05
_LABEL_GAP = 0.055
_BASELINE_NAMES = {
    "original": "raw request",
    "and_all": "AND of all words",
    "or_all": "OR of all words",
    "pico_or": "OR of the PICO elements",
    "rm3": "RM3 of the request",
}

Drawing = Callable[["Axes", list[Metrics], Evaluation], bool]
Label = tuple[float, str, str]


def write_plots(metrics: list[Metrics], evaluation: Evaluation, folder: str | Path) -> list[Path]:
    """Draw every curve for which there are figures into `folder`/*.png; returns the files, the overview last.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the folder cannot be written.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in DRAWINGS.items():
        measured = f"_{_file_part(evaluation.metric)}" if draw is draw_heldout else ""
        file = target / f"{name}{measured}.png"
        figure, (axes,) = blank_figure(1, 1, _SIZE_INCHES)
        if draw(axes, metrics, evaluation):
            figure.savefig(file, dpi=_DPI)
            written.append(file)
    if written:
        figure, grid = blank_figure(3, 2, (14.0, 12.0))
        for axes, draw in zip(grid, DRAWINGS.values(), strict=True):
            if not draw(axes, metrics, evaluation):
                axes.set_axis_off()
        figure.savefig(target / "overview.png", dpi=100)
        written.append(target / "overview.png")
    return written


def baseline_label(name: str) -> str:
    """A baseline's name in words: `rarest_2` is "AND of the 2 rarest words"."""
    if name.startswith("rarest"):
        count = name.removeprefix("rarest").removesuffix("_words").strip("_ ")
        joined = "" if name.endswith("_words") else "AND of "
        return "the rarest word" if count == "1" else f"{joined}the {count or 'k'} rarest words"
    return _BASELINE_NAMES.get(name, name)


def heading_of(metric: str) -> str:
    """A metric's name at the start of a title."""
    return metric[:1].upper() + metric[1:]


def _file_part(metric: str) -> str:
    """A metric's name as part of a file's name: whatever a user calls it stays in the folder."""
    return re.sub(r"[^\w@.-]", "_", metric)


def draw_reward(axes: Axes, metrics: list[Metrics], evaluation: Evaluation) -> bool:
    """Mean reward of the trained samples per step, with a moving mean."""
    points = series(metrics, "reward/mean")
    if not points:
        return False
    _title(axes, "Reward of trained samples", "reward (mean per step)")
    _label_lines(axes, [_smoothed(axes, points, BLUE, "moving mean")])
    return True


def draw_heldout(axes: Axes, metrics: list[Metrics], evaluation: Evaluation) -> bool:
    """The task's metric on held-out requests by step with its 95 % interval, and the baselines as lines with theirs."""
    # Evaluations run beside training, so metrics.jsonl holds them some steps late; the results know their version.
    points = {result.version: result.interval().mean for result in evaluation.history if result.rows}
    points = points or dict(series(metrics, heldout_key(evaluation.metric)))
    if not points:
        return False
    metric = evaluation.metric
    _title(axes, f"{heading_of(metric)} on held-out requests", f"{metric} (mean, band: 95 % interval)")
    labels = _baseline_lines(axes, evaluation)
    steps = sorted(points)
    axes.plot(steps, [points[step] for step in steps], color=BLUE, linewidth=2.2, marker="o", markersize=4.5)
    _policy_band(axes, evaluation)
    labels.append((points[steps[-1]], f"trained policy {points[steps[-1]]:.3f}", BLUE))
    axes.set_ylim(bottom=0.0)
    _label_lines(axes, labels)
    return True


def draw_staleness(axes: Axes, metrics: list[Metrics], evaluation: Evaluation) -> bool:
    """Mean and largest staleness per step under the guaranteed bound."""
    mean, largest = series(metrics, "staleness/mean"), series(metrics, "staleness/max")
    if not mean and not largest:
        return False
    _title(axes, "Staleness of trained tokens", "policy versions behind")
    labels = [_smoothed(axes, mean, BLUE, "mean")] if mean else []
    if largest:
        axes.plot(*_columns(largest), color=VERMILION, linestyle="none", marker="o", markersize=3)
        labels.append((largest[-1][1], "largest in the step", VERMILION))
    bound = series(metrics, "staleness/bound")
    if bound:
        axes.plot(*_columns(bound), color=INK, linewidth=1.4, linestyle=(0, (5, 3)))
        labels.append((bound[-1][1], f"bound {bound[-1][1]:.0f}", INK))
    top = max(value for points in (mean, largest, bound) for _, value in points)
    axes.set_ylim(-0.02 * max(1.0, top), max(1.0, top) * 1.15)
    _whole_numbers(axes.yaxis)
    _label_lines(axes, labels)
    return True


def draw_idle(axes: Axes, metrics: list[Metrics], evaluation: Evaluation) -> bool:
    """Share of the time in which the learner waits for a batch, and in which the actors do not decode."""
    lines = [("idle/learner", "learner", BLUE), ("idle/actor", "actors", VERMILION)]
    labels = [
        _smoothed(axes, [(step, 100 * value) for step, value in points], color, name)
        for metric, name, color in lines
        if (points := series(metrics, metric))
    ]
    if not labels:
        return False
    _title(axes, "Idle time", "share of time idle (%)")
    axes.set_ylim(0.0, min(102.0, max(10.0, axes.get_ylim()[1])))
    _label_lines(axes, labels)
    return True


def draw_length(axes: Axes, metrics: list[Metrics], evaluation: Evaluation) -> bool:
    """Length of the think part and of the query."""
    lines = [("length/think", "think", PURPLE), ("length/query", "query", GREEN)]
    labels = _smoothed_series(axes, metrics, lines)
    if not labels:
        return False
    _title(axes, "Length of think part and query", "words (mean per step)")
    axes.set_ylim(bottom=0.0)
    _label_lines(axes, labels)
    return True


def draw_throughput(axes: Axes, metrics: list[Metrics], evaluation: Evaluation) -> bool:
    """Tokens trained on and tokens generated per second."""
    lines = [("tokens/trained_per_s", "trained", BLUE), ("tokens/generated_per_s", "generated", VERMILION)]
    labels = _smoothed_series(axes, metrics, lines)
    if not labels:
        return False
    _title(axes, "Throughput", "tokens per second")
    axes.set_ylim(bottom=0.0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    _label_lines(axes, labels)
    return True


DRAWINGS: dict[str, Drawing] = {
    "reward": draw_reward,
    "heldout": draw_heldout,
    "staleness": draw_staleness,
    "idle": draw_idle,
    "length": draw_length,
    "throughput": draw_throughput,
}


def blank_figure(rows: int, columns: int, inches: tuple[float, float]) -> tuple[Any, list[Axes]]:
    """A figure outside pyplot: no global state, no window, usable from any thread."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=inches, facecolor="white", layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    grid = figure.subplots(rows, columns, squeeze=False)
    return figure, list(grid.flat)


def _title(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, loc="left", fontsize=14, fontweight="bold", color=INK, pad=24)
    axes.text(0.0, 1.03, unit, transform=axes.transAxes, fontsize=11, color=QUIET)
    axes.set_xlabel("policy update (step)", fontsize=11, color=QUIET)
    axes.tick_params(labelsize=11, colors=QUIET, length=0)
    axes.grid(axis="y", color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    _whole_numbers(axes.xaxis)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(PALE)


def _whole_numbers(axis: Axis) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]


def _smoothed(axes: Axes, points: Sequence[tuple[int, float]], color: str, name: str) -> Label:
    """The points as a pale line under their moving mean; returns the label for its right end."""
    steps, values = _columns(points)
    smooth = moving_mean(values, max(1, round(len(values) * _SMOOTH_SHARE)))
    axes.plot(steps, values, color=color, linewidth=0.9, alpha=0.35)
    axes.plot(steps, smooth, color=color, linewidth=2.2)
    return float(smooth[-1]), name, color


def _smoothed_series(axes: Axes, metrics: list[Metrics], lines: Sequence[tuple[str, str, str]]) -> list[Label]:
    """Draw each (metric, name, color) that was logged; returns their labels."""
    return [
        _smoothed(axes, points, color, name) for metric, name, color in lines if (points := series(metrics, metric))
    ]


def moving_mean(values: Sequence[float], reach: int) -> npt.NDArray[np.float64]:
    """Mean of each value with up to `reach` neighbours either side (fewer at the ends); same length."""
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    centers = np.arange(len(values))
    first = np.maximum(centers - reach, 0)
    last = np.minimum(centers + reach + 1, len(values))
    means: npt.NDArray[np.float64] = (sums[last] - sums[first]) / (last - first)
    return means


def _baseline_lines(axes: Axes, evaluation: Evaluation) -> list[Label]:
    labels: list[Label] = []
    for name, interval in evaluation.shown_baselines().items():
        axes.axhspan(interval.low, interval.high, color=QUIET, alpha=0.10, linewidth=0)
        axes.axhline(interval.mean, color=QUIET, linewidth=1.3, linestyle=(0, (5, 3)))
        labels.append((interval.mean, f"{baseline_label(name)} {interval.mean:.3f}", QUIET))
    return labels


def _policy_band(axes: Axes, evaluation: Evaluation) -> None:
    measured = [(result.version, result.interval()) for result in evaluation.history if result.rows]
    if len(measured) < 2:
        return
    versions = [version for version, _ in measured]
    low, high = [interval.low for _, interval in measured], [interval.high for _, interval in measured]
    if len(measured) > 2:
        axes.fill_between(versions, low, high, color=BLUE, alpha=0.18, linewidth=0)
    else:  # a band between two far points would claim what was not measured
        axes.vlines(versions, low, high, color=BLUE, linewidth=5, alpha=0.3)


def _label_lines(axes: Axes, labels: Sequence[Label]) -> None:
    """Write each label beside the right end of its line, pushed apart where they would overlap."""
    bottom, top = axes.get_ylim()
    at = -1.0
    for value, text, color in sorted(labels, key=lambda label: label[0]):
        place = (value - bottom) / (top - bottom)
        at = max(place, at + _LABEL_GAP) if at >= 0 else max(place, 0.0)
        axes.annotate(
            text,
            (1.01, at),
            xycoords="axes fraction",
            color=color,
            fontsize=11,
            va="center",
            annotation_clip=False,
        )
