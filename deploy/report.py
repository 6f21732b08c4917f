"""The end of a run: summary.json, curves, and what the policy's rewrites looked like before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.statistics import Interval
from common.tracking.heldout import Evaluation, HeldoutResult, HeldoutRow, read_evaluation
from common.tracking.jsonl import replace_file
from common.tracking.metrics_log import Metrics, read_metrics, series
from common.tracking.progress_view import plain
from common.tracking.summary import heldout_figure, missing_keys, update_summary
from deploy.plots import baseline_label, heading_of, write_plots

_GAINS, _MIDDLE, _LOSSES = 5, 2, 3
_CELL_CHARACTERS = 220


@dataclass(frozen=True)
class Rewrite:
    """One held-out request with the query the policy wrote for it before and after training."""

    request: str
    before: str
    after: str
    value_before: float
    value_after: float
    relevant: int | None

    @property
    def gain(self) -> float:
        """What training won of the task's metric."""
        return self.value_after - self.value_before


@dataclass(frozen=True)
class Report:
    """What `write_report` made.

    Attributes:
        summary: the whole of summary.json.
        evaluation: the held-out results it was made from.
        rewrites: the rows of rewrites.md.
        plots: the PNG files.
        notes: what is missing, and why, in one line each.
    """

    summary: Mapping[str, Any]
    evaluation: Evaluation
    rewrites: tuple[Rewrite, ...]
    plots: tuple[Path, ...]
    notes: tuple[str, ...]


def write_report(folder: str | Path, facts: Mapping[str, object] | None = None, *, curves: bool = True) -> Report:
    """Write plots/*.png, rewrites.md and summary.json of the run in `folder` from its files.

    Args:
        folder: `runs/<name>` with metrics.jsonl and heldout/ (see `common.tracking.heldout`).
        facts: what no file tells (`engine`, `trained_samples`, `dropped_stale`); wins over computed figures.
        curves: draw plots/*.png too (some seconds).

    Raises:
        FileNotFoundError: there is no metrics.jsonl.
        ValueError: a file is broken; the message names it.
        OSError: the folder cannot be written.
    """
    base = Path(folder)
    metrics = read_metrics(base / "metrics.jsonl")
    evaluation = read_evaluation(base / "heldout")
    summary = update_summary(base / "summary.json", summarize(metrics, evaluation) | dict(facts or {}))
    rewrites = select_rewrites(evaluation)
    notes = []
    if rewrites:
        replace_file(base / "rewrites.md", rewrites_markdown(rewrites, evaluation).encode())
    if lacking := missing_keys(summary, evaluation.metric):
        notes.append(f"summary.json has no {', '.join(lacking)}: not measured in this run")
    plots: list[Path] = []
    if curves:
        try:
            plots = write_plots(metrics, evaluation, base / "plots")
        except ImportError:
            notes.append("no plots: matplotlib is not installed (pip install -e '.[tracking]')")
    return Report(summary, evaluation, tuple(rewrites), tuple(plots), tuple(notes))


def summarize(metrics: Sequence[Metrics], evaluation: Evaluation) -> dict[str, Any]:
    """The figures of summary.json that metrics and held-out results tell; absent where they do not.

    `learner_idle` is seconds waited for batches / seconds of the steps, `actor_idle` weighted by step time.
    """
    summary: dict[str, Any] = {}
    if metrics:
        summary["steps"] = max(int(line["step"]) for line in metrics)
        if stalest := [value for _, value in series(metrics, "staleness/max")]:
            summary["max_staleness_seen"] = int(max(stalest))
        _put(summary, "learner_idle", _ratio(metrics, "timing/wait_s", "timing/step_s"))
        _put(summary, "actor_idle", _time_weighted(metrics, "idle/actor"))
        _put(summary, "wall_s", max((v for _, v in series(metrics, "time/elapsed_s")), default=None))
    return summary | _heldout_figures(evaluation)


def _heldout_figures(evaluation: Evaluation) -> dict[str, Any]:
    baselines, metric = evaluation.shown_baselines(), evaluation.metric
    figures: dict[str, Any] = {}
    intervals: dict[str, Interval] = {}
    for name, interval in baselines.items():
        short = "rarest" if name.startswith("rarest") else name
        figures[heldout_figure(metric, short)] = interval.mean
        intervals[name] = interval
        if short == "rarest":
            figures["heldout_rarest_is"] = name
    for name, result in (("start", evaluation.start), ("trained", evaluation.trained)):
        if result is not None and result.rows:
            intervals[name] = result.interval()
            figures[heldout_figure(metric, name)] = intervals[name].mean
    if trained := intervals.get("trained"):
        figures["heldout_ci95"] = [trained.low, trained.high]
        if baselines:
            figures["heldout_above_baselines"] = all(trained.low > other.high for other in baselines.values())
    if intervals:
        figures["heldout_metric"] = metric
        figures["heldout_intervals"] = {name: [item.low, item.high] for name, item in intervals.items()}
    return figures


def _put(summary: dict[str, Any], key: str, value: float | None) -> None:
    if value is not None:
        summary[key] = value


def _ratio(metrics: Sequence[Metrics], part: str, whole: str) -> float | None:
    both = [line for line in metrics if line.get(part) is not None and line.get(whole)]
    total = sum(line[whole] for line in both)
    return sum(line[part] for line in both) / total if total else None


def _time_weighted(metrics: Sequence[Metrics], name: str) -> float | None:
    both = [line for line in metrics if line.get(name) is not None and line.get("timing/step_s")]
    total = sum(line["timing/step_s"] for line in both)
    return sum(line[name] * line["timing/step_s"] for line in both) / total if total else None


def select_rewrites(evaluation: Evaluation) -> list[Rewrite]:
    """The largest gains, the middle and the largest losses on the held-out requests: good and bad alike."""
    if evaluation.start is None or evaluation.trained is None:
        return []
    ranked = sorted(pair_rewrites(evaluation.start, evaluation.trained), key=lambda rewrite: -rewrite.gain)
    if len(ranked) <= _GAINS + _MIDDLE + _LOSSES:
        return ranked
    middle = len(ranked) // 2
    return ranked[:_GAINS] + ranked[middle : middle + _MIDDLE] + ranked[-_LOSSES:]


def pair_rewrites(start: HeldoutResult, trained: HeldoutResult) -> list[Rewrite]:
    """The requests that both evaluations hold, in the order of `trained`."""
    before = {row.id: row for row in start.rows}
    return [
        Rewrite(
            row.request,
            _query(before[row.id]),
            _query(row),
            before[row.id].value,
            row.value,
            _relevant(row),
        )
        for row in trained.rows
        if row.id in before
    ]


def _query(row: HeldoutRow) -> str:
    return "(no valid answer)" if row.query is None else row.query


def _relevant(row: HeldoutRow) -> int | None:
    return len(row.relevant) if isinstance(row.relevant, list) else row.relevant


def rewrites_markdown(rewrites: Sequence[Rewrite], evaluation: Evaluation) -> str:
    """rewrites.md: the table of means and the sample rewrites."""
    means, metric = ranking(evaluation), _markdown(evaluation.metric)
    lines = [
        "# Rewrites before and after training",
        "",
        f"| held-out {metric} | mean | 95 % interval |",
        "|---|---:|---|",
        *(f"| {name} | {item.mean:.3f} | {item.low:.3f} – {item.high:.3f} |" for name, item in means),
        "",
        "Sample requests: the largest gains, the middle, and the largest losses, in that order.",
        "",
        f"| request | relevant | query before | {metric} | query after | {metric} |",
        "|---|---:|---|---:|---|---:|",
    ]
    for item in rewrites:
        cells = (
            _markdown(item.request),
            "–" if item.relevant is None else str(item.relevant),
            _code(item.before),
            f"{item.value_before:.2f}",
            _code(item.after),
            f"{item.value_after:.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def ranking(evaluation: Evaluation) -> list[tuple[str, Interval]]:
    """Baselines, warm start and trained policy with their intervals, lowest first."""
    entries = [(baseline_label(name), item) for name, item in evaluation.shown_baselines().items()]
    for name, result in (("policy at start", evaluation.start), ("trained policy", evaluation.trained)):
        if result is not None and result.rows:
            entries.append((name, result.interval()))
    return sorted(entries, key=lambda entry: entry[1].mean)


def _short(text: str) -> str:
    line = " ".join(plain(text).split())
    return line if len(line) <= _CELL_CHARACTERS else line[: _CELL_CHARACTERS - 1] + "…"


def _markdown(text: str) -> str:
    """One table cell of running text: nothing in it is taken for markup."""
    escaped = _short(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for char in "\\`*_[]|":
        escaped = escaped.replace(char, f"\\{char}")
    return escaped


def _code(text: str) -> str:
    """One table cell of code; backticks would end it, a pipe the cell; neither can be escaped there."""
    return "`" + _short(text).replace("`", "'").replace("|", "¦") + "`"


def print_report(report: Report, console: Console) -> None:
    """Show the table of means, sample rewrites, notes and where the files are."""
    if entries := ranking(report.evaluation):
        console.print(_means_table(entries, report.evaluation.metric))
    if report.rewrites:
        console.print(_rewrites_table(report.rewrites, report.evaluation.metric))
    for note in report.notes:
        console.print(Text(f"note: {note}", style="yellow"))
    if report.plots:
        console.print(Text(f"curves: {report.plots[0].parent}", style="dim"))


def _means_table(entries: Sequence[tuple[str, Interval]], metric: str) -> Table:
    table = Table(title=Text(f"{heading_of(metric)} on held-out requests"), title_justify="left", box=SIMPLE)
    table.add_column("query")
    table.add_column(Text(metric), justify="right")
    table.add_column("95 % interval")
    for name, item in entries:
        style = "bold magenta" if name == "trained policy" else ""
        table.add_row(Text(name), f"{item.mean:.3f}", f"{item.low:.3f} – {item.high:.3f}", style=style)
    return table


def _rewrites_table(rewrites: Sequence[Rewrite], metric: str) -> Table:
    table = Table(title="Rewrites before and after", title_justify="left", box=SIMPLE, show_lines=True)
    for heading in ("request", "before", "after"):
        table.add_column(heading, ratio=1, overflow="fold")
    table.add_column(Text(metric), justify="right", no_wrap=True)
    for item in rewrites:
        color = "green" if item.gain > 0 else "red" if item.gain < 0 else ""
        table.add_row(
            Text(_short(item.request)),
            Text(_short(item.before)),
            Text(_short(item.after)),
            Text(f"{item.value_before:.2f} → {item.value_after:.2f}", style=color),
        )
    return table
