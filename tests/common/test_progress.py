"""The live display: what it shows, that it fits, and that nothing can break it."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from common.tracking.metrics_log import MetricsLog
from common.tracking.progress import LiveProgress, MetricsTail
from common.tracking.progress_state import build_state, duration, quantity, remaining_seconds, sparkline
from common.tracking.progress_view import render, render_line

STATUS: dict[str, Any] = {
    "run": "demo",
    "engine": "vllm",
    "device": "cpu",
    "steps": 40,
    "baselines": {"original": 0.02, "rarest_1": 0.41},
    "roles": [
        {"name": "learner"},
        {"name": "actor-0", "state": "stalled", "waits_for": "weights of version 20", "since_s": 14.0},
    ],
    "warning": "PubMed answered 429; waiting 3 s",
}


def step_metrics(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "reward/mean": step / 10,
        "reward/invalid_share": 0.02,
        "recall/train": 0.3,
        "staleness/mean": 0.84,
        "staleness/max": 1,
        "staleness/bound": 2,
        "idle/learner": 0.03,
        "idle/actor": 0.11,
        "timing/step_s": 1.5,
        "tokens/trained_per_s": 3312.0,
        "tokens/generated_per_s": 4100.0,
        "queue/rollout": 12,
        "queue/score": 3,
        "queue/train": 31,
        "queue/outstanding": 64,
        "quota/utilisation": 0.87,
    } | ({"recall/heldout": 0.1 + step / 50} if step % 10 == 0 else {})


METRICS = [step_metrics(step) for step in range(1, 21)]


def drawn(state: Any, width: int = 100) -> str:
    output = io.StringIO()
    Console(file=output, width=width, force_terminal=True, color_system=None).print(render(state))
    return output.getvalue()


def test_everything_worth_watching_is_on_the_screen() -> None:
    screen = drawn(build_state(METRICS, STATUS, elapsed_s=61.0))
    for shown in (
        *("demo", "vllm", "cpu", "step 20/40", "1m01s gone", "30s left"),
        *("2.000", "0.500", "step 20 · above 2/2 baselines", "b rarest_1 0.410", "◆ now 0.500"),
        *("mean 0.84 max 1 ≤ 2", "rollout 12 → score 3 → train 31", "64 groups", "87 %"),
        *("trained 3.31k", "generated 4.1k", "idle learner 3 %", "actor 11 %"),
        *("● learner", "waits for weights of version 20", "14s", "! PubMed answered 429"),
    ):
        assert shown in screen


def test_another_metric_of_the_task_is_shown_under_its_name() -> None:
    lines = [{"step": 1, "reward/mean": 1.0, "ndcg@10/train": 0.31, "ndcg@10/heldout": 0.42}]
    screen = drawn(build_state(lines, {"steps": 4, "metric": "ndcg@10"}, elapsed_s=1.0))
    assert "ndcg@10 0.310" in screen
    assert "ndcg@10 at step 1" in screen
    assert "◆ now 0.420" in screen
    assert "recall" not in screen


def test_before_the_first_step_every_role_says_what_it_does() -> None:
    roles = [
        {"name": "learner", "state": "starting", "phase": "building model", "fraction": 0.43, "since_s": 51},
        {"name": "actor-0", "state": "starting", "phase": "starting vLLM"},
    ]
    state = build_state([], {"run": "demo", "steps": 40, "roles": roles}, elapsed_s=51.0)
    screen = drawn(state)
    assert "building model 43 %" in screen
    assert "starting vLLM" in screen
    assert "held-out" not in screen
    assert render_line(state) == "[51s] learner: building model 43 %; actor-0: starting vLLM"


def test_an_empty_snapshot_can_be_drawn() -> None:
    state = build_state([], {}, elapsed_s=0.0)
    assert "waiting for the roles to start" in drawn(state)
    assert render_line(state) == "[0s] starting"


def test_the_plain_line() -> None:
    line = render_line(build_state(METRICS, STATUS, elapsed_s=61.0))
    assert line == (
        "[1m01s] step 20/40 | reward 2.000 | held-out 0.500 | staleness mean 0.84 max 1 ≤ 2 | 3.31k tok/s"
        " | idle learner 3 % actor 11 % | queues 12/3/31 | quota 87 % | left 30s"
        " | actor-0 stalled: waits for weights of version 20 | warning: PubMed answered 429; waiting 3 s"
    )


def test_live_figures_win_over_those_of_the_last_step() -> None:
    state = build_state(METRICS, STATUS | {"live": {"queue/score": 99}}, elapsed_s=61.0)
    assert "queues 12/99/31" in render_line(state)


names = st.sampled_from([*METRICS[9], "recall/heldout"])
numbers = st.one_of(st.none(), st.floats(-1e6, 1e6), st.integers(0, 10**9))
lines = st.lists(st.tuples(st.integers(0, 500), st.dictionaries(names, numbers, max_size=8)), max_size=30)


@given(
    steps=lines,
    text=st.text(max_size=40),
    baselines=st.dictionaries(st.text(max_size=8), st.floats(0, 1), max_size=8),
    width=st.integers(20, 200),
)
@settings(max_examples=50, deadline=None)
def test_whatever_the_figures_it_draws_within_the_screen(
    steps: list[tuple[int, dict[str, Any]]], text: str, baselines: dict[str, float], width: int
) -> None:
    metrics = [values | {"step": step} for step, values in sorted(steps, key=lambda item: item[0])]
    status = STATUS | {"run": text, "warning": text, "baselines": baselines, "roles": [{"name": text}]}
    state = build_state(metrics, status, elapsed_s=3.0)
    screen = drawn(state, width)
    assert all(cell_len(line) <= width for line in screen.split("\n"))
    assert "\n" not in render_line(state)
    assert "\x1b" not in render_line(state)


def test_text_of_the_model_cannot_reach_the_terminal_as_commands() -> None:
    state = build_state(METRICS, STATUS | {"warning": "\x1b[2J[red]gone\r\nline"}, elapsed_s=1.0)
    assert "\x1b" not in drawn(state)
    assert "[2J[red]gone" in drawn(state), "square brackets are text, not markup"


@pytest.mark.parametrize(
    ("values", "width", "expected"),
    [
        ([], 8, ""),
        ([1.0], 8, "▅"),
        ([0.0, 1.0], 8, "▁█"),
        ([0.0, 0.0, 1.0, 1.0], 2, "▁█"),
        (list(range(8)), 8, "▁▂▃▄▅▆▇█"),
    ],
)
def test_sparkline(values: list[float], width: int, expected: str) -> None:
    assert sparkline(values, width) == expected


def test_sparkline_on_a_fixed_scale() -> None:
    assert sparkline([0.0, 0.5, 2.0], 3, low=0.0, high=1.0) == "▁▅█"


def test_time_left_follows_the_recent_pace() -> None:
    slow_start = [{"step": step, "timing/step_s": 60.0 if step < 5 else 2.0} for step in range(1, 31)]
    assert remaining_seconds(slow_start, step=30, steps=100) == pytest.approx(140.0)
    assert remaining_seconds([], step=0, steps=100) is None


def test_units() -> None:
    assert [duration(value) for value in (None, 0.4, 59.6, 3599, 7620)] == [
        "–",
        "0s",
        "1m00s",
        "59m59s",
        "2h07m",
    ]
    assert [quantity(value) for value in (None, 0, 87, 4234, 1.3e6)] == ["–", "0", "87", "4.23k", "1.3M"]


def test_the_tail_reads_only_what_is_new_and_notices_a_resume(tmp_path: Path) -> None:
    tail = MetricsTail(tmp_path / "metrics.jsonl")
    assert tail.read() == []
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        log.log(step, {"reward/mean": float(step)})
    assert [line["step"] for line in tail.read()] == [1, 2, 3]
    with open(log.path, "ab") as file:
        file.write(b'{"step":4,"rew')
        file.flush()
        assert [line["step"] for line in tail.read()] == [1, 2, 3]
        file.write(b'ard/mean":4.0}\n')
    assert [line["step"] for line in tail.read()] == [1, 2, 3, 4]
    log.resume_at(2)
    log.log(3, {"reward/mean": 30.0})
    assert [line["reward/mean"] for line in tail.read()] == [1.0, 2.0, 30.0]


def test_a_pipe_gets_plain_lines_from_start_to_end(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    output = io.StringIO()
    console = Console(file=output, force_terminal=False, width=60)
    with LiveProgress(log.path, lambda: STATUS, console=console, line_s=0.05):
        time.sleep(0.2)
        for step in range(1, 21):
            log.log(step, step_metrics(step))
    lines = output.getvalue().splitlines()
    assert len(lines) >= 3
    assert lines[0].startswith("[0s] learner: running; actor-0: waits for weights")
    assert "step 20/40" in lines[-1], "the last line shows the end of the run"
    assert "\x1b" not in output.getvalue()


def test_a_terminal_gets_the_live_picture(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=100, height=40)
    with LiveProgress(log.path, lambda: STATUS, console=console, refresh_s=0.02):
        for step in range(1, 21):
            log.log(step, step_metrics(step))
            time.sleep(0.005)
    assert "\x1b[" in output.getvalue()
    assert "20/40" in output.getvalue()


def test_a_snapshot_that_fails_is_a_warning_on_the_screen(tmp_path: Path) -> None:
    def broken() -> dict[str, Any]:
        raise RuntimeError("the broker does not answer")

    state = LiveProgress(tmp_path / "metrics.jsonl", broken, console=Console(file=io.StringIO())).state()
    assert state.warning == "progress display: the broker does not answer"
    assert "the broker does not answer" in drawn(state)
