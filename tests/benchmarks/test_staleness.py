"""The bookkeeping of the staleness benchmark: figures of a run, resuming, the comparison, the picture."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import msgspec
import pytest

from benchmarks.staleness import (
    LOSSES,
    Cell,
    Record,
    digest,
    draw,
    full_queue,
    markdown,
    read_record,
    summarize,
)
from common.config import load_config
from common.tracking.heldout import HeldoutResult, HeldoutRow, write_heldout
from common.tracking.metrics_log import MetricsLog

CONFIG = Path(__file__).parents[2] / "configs" / "demo.yaml"


def cell(loss: str, bound: int, recall: list[float], seed: int = 0) -> Cell:
    return Cell(loss, bound, seed, recall, 0.1, 100.0, 1.0, bound * 0.8, float(bound), bound, 768)


def test_every_group_that_may_be_outstanding_is_drawn_at_once() -> None:
    record = Record(str(CONFIG), [])
    for bound in (0, 16):
        config = load_config(CONFIG, full_queue(record, bound))
        admitted = (config.learner.max_staleness + 1) * config.learner.groups_per_step
        assert config.learner.max_staleness == bound
        assert config.actor.concurrent_groups == admitted
        assert config.rewarder.concurrent_groups >= admitted


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_losses_are_known_to_the_config(loss: str) -> None:
    assert load_config(CONFIG, [f"algorithm.loss={LOSSES[loss]}"]).algorithm.loss == LOSSES[loss]


def test_ages_count_once_the_pipeline_is_full(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", clock=iter(range(100, 200, 2)).__next__)
    for step, age in enumerate((0, 1, 2, 2, 2), start=1):
        log.log(step, {"timing/step_s": 2.0, "staleness/mean": age / 2, "staleness/max": age})
    rows = [HeldoutRow("a", "request", "", "q", 0.25), HeldoutRow("b", "request", "", "q", 0.75)]
    write_heldout(tmp_path / "heldout" / "trained.json", HeldoutResult(5, rows))
    summary = {"heldout_recall_start": 0.1, "max_staleness_seen": 2, "trained_samples": 320, "wall_s": 61.23}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert digest(tmp_path, "tis", 2, 7) == Cell("tis", 2, 7, [0.25, 0.75], 0.1, 61.2, 2.0, 1.0, 2.0, 2, 320)


def test_finished_cells_are_kept_for_the_same_settings_only(tmp_path: Path) -> None:
    path, wanted = tmp_path / "cells.json", Record("demo.yaml", ["learner.steps=4"])
    assert read_record(path, wanted).cells == {}
    done = cell("tis", 4, [0.5])
    path.write_bytes(msgspec.json.encode(Record(wanted.config, wanted.overrides, {done.key: done})))
    assert read_record(path, wanted).cells == {"tis/4/0": done}
    with pytest.raises(SystemExit, match="choose another --folder"):
        read_record(path, Record("demo.yaml", ["learner.steps=5"]))


def test_a_loss_is_compared_with_its_own_synchronous_run_request_by_request() -> None:
    synchronous = [cell("tis", 0, [0.2, 0.8] * 20), cell("tis", 0, [0.4, 1.0] * 20, seed=1)]
    stale = [cell("tis", 4, [0.1, 0.7] * 20), cell("tis", 4, [0.3, 0.9] * 20, seed=1)]
    other = [cell("uncorrected", 4, [0.0, 0.1] * 20)]
    rows = {(row["loss"], row["max_staleness"]): row for row in summarize([*stale, *synchronous, *other])}
    row = rows["tis", 4]
    assert row["recall_by_seed"] == {"0": 0.4, "1": 0.6}
    assert row["recall"] == 0.5
    # Every request lost 0.1, so there is no doubt, though the intervals of the means overlap.
    assert row["against_synchronous_ci95"] == pytest.approx([-0.1, -0.1])
    assert row["ci95"][1] > rows["tis", 0]["ci95"][0]
    assert "against_synchronous" not in rows["uncorrected", 4]
    assert "| tis | 4 | 0.500 |" in markdown([row])


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_the_picture_is_drawn(tmp_path: Path) -> None:
    rows = summarize([cell(loss, bound, [0.1, 0.6] * 10) for loss in LOSSES for bound in (0, 4)])
    path = draw(rows, tmp_path / "new" / "staleness.png")
    assert path is not None
    assert Path(path).read_bytes().startswith(b"\x89PNG")
