"""The whole system for real: every process, the generated world, a model warm-started here. It has to learn."""

from __future__ import annotations

import importlib.util
import json
import signal
import time
from pathlib import Path

import pytest

from common.tracking.metrics_log import read_metrics
from common.tracking.summary import REQUIRED_KEYS, read_summary
from tests.deploy.small_run import MODEL, SmallRun

SETTINGS = (*MODEL, "learner.eval_every=0", "data.heldout_limit=100", "tracking.wandb=offline")

pytestmark = pytest.mark.slow


@pytest.mark.timeout(900)
def test_recall_on_requests_never_seen_rises(demo_folder: Path) -> None:
    small = SmallRun(demo_folder, "learns", [*SETTINGS, "learner.steps=45"]).start()
    output = small.finish()
    run = small.folder.path
    summary = read_summary(run / "summary.json")
    assert [key for key in REQUIRED_KEYS if key not in summary] == []
    assert summary["engine"] == "transformers"
    assert "transformers" in output.splitlines()[0]
    assert summary["heldout_recall_trained"] > 1.5 * summary["heldout_recall_start"]
    assert summary["heldout_recall_trained"] > summary["heldout_recall_start"] + 0.02
    assert summary["max_staleness_seen"] <= 2
    assert summary["dropped_stale"] == 0
    small.assert_balanced(steps=45, groups_per_step=32)
    steps = [line["step"] for line in read_metrics(run / "metrics.jsonl")]
    assert steps == list(range(46))
    assert len(list((run / "plots").glob("*.png"))) >= 6
    assert "| " in (run / "rewrites.md").read_text()
    assert list(run.glob("wandb/offline-run-*/*.wandb")), "W&B recorded the run without a network"
    for log in (run / "logs").glob("*.log"):
        assert "Traceback" not in log.read_text(), log
    assert small.processes() == []


NO_VLLM = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("engine", ["transformers", pytest.param("vllm", marks=NO_VLLM)])
def test_ctrl_c_saves_and_resume_goes_on_from_the_same_version(demo_folder: Path, engine: str) -> None:
    shared = [*SETTINGS, f"actor.engine={engine}", "learner.groups_per_step=16", "data.heldout_limit=16"]
    name = f"interrupted-{engine}"
    small = SmallRun(demo_folder, name, [*shared, "learner.steps=200", "learner.checkpoint_every=1000"]).start()
    run = small.folder.path
    small.wait_for_step(3)
    began = time.monotonic()
    assert small.launcher is not None
    small.launcher.send_signal(signal.SIGINT)
    output = small.finish(status=130, seconds=60)
    assert time.monotonic() - began < 15
    assert "Interrupted and saved" in output
    assert small.processes() == []
    last = read_metrics(run / "metrics.jsonl")[-1]["step"]
    first, newest = sorted(folder.name for folder in (run / "checkpoints").iterdir())
    assert first == "step-00000000"
    assert newest == f"step-{last:08d}"
    resumed = SmallRun(demo_folder, name, [*shared, f"learner.steps={last + 2}"], command=("train", "--resume"))
    resumed.start().finish()
    assert resumed.processes() == []
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    versions = [line["version"] for line in lines if "version" in line]
    assert versions == [float(version) for version in range(1, last + 3)], "no version twice, none left out"
    summary = read_summary(run / "summary.json")
    assert summary["engine"] == engine
    assert summary["ledger"]["trained"] == (last + 2) * 16
