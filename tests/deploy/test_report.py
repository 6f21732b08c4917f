"""summary.json, rewrites.md and the curves, from the files that a run leaves."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from common.tracking.heldout import (
    Evaluation,
    HeldoutResult,
    HeldoutRow,
    write_baselines,
    write_heldout,
)
from common.tracking.metrics_log import MetricsLog, read_metrics
from common.tracking.summary import REQUIRED_KEYS
from deploy.plots import baseline_label, moving_mean, write_plots
from deploy.report import (
    pair_rewrites,
    print_report,
    rewrites_markdown,
    select_rewrites,
    summarize,
    write_report,
)

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed"
)
REQUESTS = 40


def result(version: int, recalls: list[float], query: str | None = "asthma AND steroid*") -> HeldoutResult:
    rows = [
        HeldoutRow(str(index), f"request {index}", "<answer>", query, recall, relevant=2, hits=1)
        for index, recall in enumerate(recalls)
    ]
    return HeldoutResult(version, rows)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 20 steps whose figures can be computed by hand."""
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(1, 21):
        log.log(
            step,
            {
                "reward/mean": step / 10,
                "recall/heldout": 0.4 if step == 13 else None,
                "staleness/mean": 0.5,
                "staleness/max": 2 if step == 7 else 1,
                "staleness/bound": 2,
                "timing/step_s": 3.0 if step == 1 else 1.0,
                "timing/wait_s": 2.0 if step == 1 else 0.1,
                "idle/learner": 0.5,
                "idle/actor": 0.4 if step == 1 else 0.2,
                "length/think": 100.0,
                "length/query": 40.0,
                "tokens/trained_per_s": 3000.0,
                "tokens/generated_per_s": 4000.0,
                "time/elapsed_s": step * 1.5,
            },
        )
    heldout = tmp_path / "heldout"
    write_heldout(heldout / "start.json", result(0, [0.0] * 30 + [0.5] * 10, None))
    write_heldout(heldout / "trained.json", result(20, [1.0] * 30 + [0.0] * 10))
    write_baselines(
        heldout / "baselines.json",
        {
            "original": [0.0] * REQUESTS,
            "and_all": [0.0] * 39 + [1.0],
            "or_all": [0.0] * REQUESTS,
            "rarest_1": [0.25] * REQUESTS,
            "rarest_2": [0.5, 0.0] * 20,
            "rarest_3": [0.3] * REQUESTS,
        },
    )
    return tmp_path


def test_the_summary_has_every_key_with_the_right_figure(run: Path) -> None:
    report = write_report(run, {"engine": "vllm", "trained_samples": 5120, "dropped_stale": 0}, curves=False)
    assert [key for key in REQUIRED_KEYS if key not in report.summary] == []
    assert report.notes == ()
    summary = json.loads((run / "summary.json").read_text())
    assert summary == dict(report.summary)
    assert summary["steps"] == 20
    assert summary["max_staleness_seen"] == 2
    assert summary["learner_idle"] == pytest.approx((2.0 + 19 * 0.1) / 22.0), "seconds waited / seconds"
    assert summary["actor_idle"] == pytest.approx((3 * 0.4 + 19 * 0.2) / 22.0), "weighted by time"
    assert summary["wall_s"] == 30.0
    assert summary["heldout_recall_start"] == 0.125
    assert summary["heldout_recall_trained"] == 0.75
    assert summary["heldout_recall_and_all"] == 0.025
    assert (summary["heldout_recall_rarest"], summary["heldout_rarest_is"]) == (
        pytest.approx(0.3),
        "rarest_3",
    )
    low, high = summary["heldout_ci95"]
    assert low < 0.75 < high
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.75 * 0.25 / REQUESTS), rel=0.2), "normal approximation"
    assert summary["heldout_above_baselines"] is True


def test_a_task_with_another_metric_has_it_in_every_name(run: Path) -> None:
    for name, version in (("start", 0), ("trained", 20)):
        rows = [
            HeldoutRow(str(n), f"request {n}", "<answer>", "q", value=(n % 2) * version / 20) for n in range(REQUESTS)
        ]
        write_heldout(run / "heldout" / f"{name}.json", HeldoutResult(version, rows, "hits@20"))
    (run / "heldout" / "baselines.json").unlink()
    facts = {"engine": "vllm", "trained_samples": 5120, "dropped_stale": 0}
    report = write_report(run, facts, curves=False)
    assert report.notes == (), "not every engine has baselines"
    assert (report.summary["heldout_hits@20_start"], report.summary["heldout_hits@20_trained"]) == (0.0, 0.5)
    assert report.summary["heldout_metric"] == "hits@20"
    assert not [key for key in report.summary if "recall" in key]
    output = io.StringIO()
    print_report(report, Console(file=output, width=200))
    for text in (output.getvalue(), (run / "rewrites.md").read_text()):
        assert "hits@20" in text
        assert "recall" not in text.lower()


def test_an_interval_that_touches_a_baseline_is_not_above_it(run: Path) -> None:
    write_heldout(run / "heldout" / "trained.json", result(20, [1.0] * 14 + [0.0] * 26))
    summary = write_report(run, curves=False).summary
    assert summary["heldout_recall_trained"] > summary["heldout_recall_rarest"]
    assert summary["heldout_above_baselines"] is False


def test_what_was_not_measured_is_absent_and_said(tmp_path: Path) -> None:
    MetricsLog(tmp_path / "metrics.jsonl").log(1, {"reward/mean": 0.5})
    report = write_report(tmp_path, curves=False)
    assert "heldout_recall_trained" not in report.summary
    assert "heldout_recall_trained" in report.notes[0]
    assert not (tmp_path / "rewrites.md").exists()
    assert summarize([], Evaluation()) == {}


def test_a_run_without_metrics_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl"):
        write_report(tmp_path)


def test_rewrites_show_gains_middle_and_losses(run: Path) -> None:
    rewrites = write_report(run, curves=False).rewrites
    gains = [rewrite.gain for rewrite in rewrites]
    assert gains == [1.0] * 7 + [-0.5] * 3
    assert {rewrite.before for rewrite in rewrites} == {"(no valid answer)"}
    text = (run / "rewrites.md").read_text()
    assert "| trained policy | 0.750 |" in text
    assert "| request 0 | 2 | `(no valid answer)` | 0.00 | `asthma AND steroid*` | 1.00 |" in text
    assert text.index("policy at start") < text.index("the 3 rarest words") < text.index("trained policy")


def test_requests_are_paired_by_id() -> None:
    start = HeldoutResult(
        0, [HeldoutRow("a", "A", "", "qa", 0.25, ["1", "2"], []), HeldoutRow("b", "B", "", "qb", 0, 1, 0)]
    )
    trained = HeldoutResult(
        1, [HeldoutRow("c", "C", "", "x", 1, 1, 1), HeldoutRow("a", "A", "", "qa2", 0.75, ["1", "2"], [])]
    )
    (rewrite,) = pair_rewrites(start, trained)
    assert (rewrite.before, rewrite.after, rewrite.gain, rewrite.relevant) == ("qa", "qa2", 0.5, 2)
    assert select_rewrites(Evaluation(start=start)) == []


@given(request=st.text(max_size=300), query=st.text(max_size=300))
def test_model_text_cannot_break_the_table(request: str, query: str) -> None:
    rows = [HeldoutRow("a", request, "", query, 0.5, 1, 1)]
    evaluation = Evaluation(start=HeldoutResult(0, rows), trained=HeldoutResult(1, rows))
    rewrites = select_rewrites(evaluation)
    *_, line = rewrites_markdown(rewrites, evaluation).rstrip("\n").split("\n")
    separators = [at for at, char in enumerate(line) if char == "|" and (at == 0 or line[at - 1] != "\\")]
    assert len(separators) == 7, "six cells"
    cells = [line[start + 1 : end].strip() for start, end in pairwise(separators)]
    for cell in (cells[2], cells[4]):
        assert re.fullmatch(r"`[^`]*`", cell), "one code span, closed where the cell ends"
    assert cells[1::2] == ["1", "0.50", "0.50"]
    assert "\x1b" not in line


def test_the_printed_report_names_the_winner_and_takes_markup_as_text(run: Path) -> None:
    write_heldout(run / "heldout" / "trained.json", result(20, [1.0] * REQUESTS, "[bold]asthma[ti]\x1b[2J"))
    output = io.StringIO()
    print_report(write_report(run, curves=False), Console(file=output, width=120))
    shown = output.getvalue()
    assert "trained policy" in shown
    assert "[bold]asthma[ti]" in shown
    assert "\x1b" not in shown
    assert "note: summary.json has no engine, trained_samples, dropped_stale" in shown


@needs_matplotlib
def test_every_curve_is_drawn_as_a_readable_png(run: Path) -> None:
    from matplotlib.image import imread

    paths = write_report(run).plots
    assert [path.name for path in paths] == [
        *("reward.png", "heldout_recall.png", "staleness.png", "idle.png", "length.png", "throughput.png"),
        "overview.png",
    ]
    for path in paths:
        pixels = imread(path)
        assert pixels.shape[0] >= 600
        assert pixels.shape[1] >= 1000
        assert 0.001 < np.mean(pixels[..., :3].min(axis=2) < 0.6) < 0.5, f"{path.name} is empty or smeared"


@needs_matplotlib
def test_the_heldout_figure_holds_baselines_band_and_labels(run: Path) -> None:
    from matplotlib.figure import Figure

    from common.tracking.heldout import read_evaluation
    from deploy.plots import draw_heldout

    write_heldout(run / "heldout" / "v10.json", result(10, [0.5] * 20 + [0.0] * 20))
    axes = Figure().subplots()
    assert draw_heldout(axes, read_metrics(run / "metrics.jsonl"), read_evaluation(run / "heldout"))
    flat = {float(line.get_ydata()[0]) for line in axes.lines if len(set(line.get_ydata())) == 1}
    assert sorted(flat) == pytest.approx([0.0, 0.025, 0.3]), "a line per baseline, the best rarest only"
    texts = [text.get_text() for text in axes.texts]
    assert "trained policy 0.750" in texts
    assert "AND of the 3 rarest words 0.300" in texts
    heights = sorted(text.xy[1] for text in axes.texts if hasattr(text, "xy"))
    assert min(np.diff(heights)) > 0.05, "labels do not overlap"
    (policy,) = [line for line in axes.lines if len(set(line.get_ydata())) > 1]
    assert list(policy.get_xdata()) == [0, 10, 20], "at the version measured, not at the step that logged it"
    assert "recall (mean, band: 95 % interval)" in texts


@needs_matplotlib
def test_curves_without_figures_are_left_out(tmp_path: Path) -> None:
    written = write_plots([{"step": 1, "reward/mean": 0.5}], Evaluation(), tmp_path)
    assert [path.name for path in written] == ["reward.png", "overview.png"]
    assert write_plots([], Evaluation(), tmp_path / "none") == []


def test_without_matplotlib_the_rest_is_written(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report = write_report(run, {"engine": "vllm", "trained_samples": 1, "dropped_stale": 0})
    assert report.plots == ()
    assert report.notes == ("no plots: matplotlib is not installed (pip install -e '.[tracking]')",)
    assert (run / "rewrites.md").exists()


@given(values=st.lists(st.floats(-100, 100), min_size=1, max_size=40), reach=st.integers(0, 50))
def test_moving_mean_against_its_definition(values: list[float], reach: int) -> None:
    expected = [np.mean(values[max(0, center - reach) : center + reach + 1]) for center in range(len(values))]
    np.testing.assert_allclose(moving_mean(values, reach), expected, atol=1e-9)


def test_baselines_are_named_in_words() -> None:
    assert [baseline_label(name) for name in ("original", "rarest_1", "rarest_3", "rarest", "own")] == [
        *("raw request", "the rarest word", "AND of the 3 rarest words", "AND of the k rarest words", "own"),
    ]
