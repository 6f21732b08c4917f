"""The whole system for real: every process, the generated world, a model warm-started here. It has to learn."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from common.tracking.metrics_log import read_metrics
from common.tracking.summary import REQUIRED_KEYS, read_summary

ROOT = Path(__file__).parents[2]
SETTINGS = [
    "actor.engine=transformers",
    "model.warm_start.steps=300",
    "model.warm_start.minutes=5",
    "learner.eval_every=0",
    "data.heldout_limit=100",
    "tracking.wandb=offline",
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all tests of this module, so that world and model are built once."""
    return tmp_path_factory.mktemp("end_to_end")


def train(folder: Path, name: str, *overrides: str, resume: bool = False) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "deploy.cli", "train", str(ROOT / "configs" / "demo.yaml")]
    command += [f"run.name={name}", *SETTINGS, *overrides, *(["--resume"] if resume else [])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DEEPRETRIEVAL_CACHE": str(folder / "cache")}
    environment.pop("WANDB_MODE", None)
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen[str], status: int = 0, seconds: float = 550) -> str:
    output, _ = process.communicate(timeout=seconds)
    assert process.returncode == status, output
    assert "Traceback" not in output
    return output


def processes_of(folder: Path) -> list[psutil.Process]:
    """Processes that still work in a run's folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(str(folder) in word for word in process.info["cmdline"] or []):
            found.append(process)
    return found


@pytest.mark.timeout(900)
def test_recall_on_requests_never_seen_rises(folder: Path) -> None:
    output = finish(train(folder, "learns", "learner.steps=30"))
    run = folder / "runs" / "learns"
    summary = read_summary(run / "summary.json")
    assert [key for key in REQUIRED_KEYS if key not in summary] == []
    assert summary["engine"] == "transformers"
    assert "transformers" in output.splitlines()[0]
    assert summary["heldout_recall_trained"] > 1.5 * summary["heldout_recall_start"]
    assert summary["heldout_recall_trained"] > summary["heldout_recall_start"] + 0.02
    assert summary["max_staleness_seen"] <= 2
    assert summary["dropped_stale"] == 0
    ledger = summary["ledger"]
    aside = sum(count for rule, count in ledger.items() if rule.startswith("set_aside"))
    assert ledger["issued"] == ledger["trained"] + ledger["outstanding"] + aside
    assert ledger["trained"] * 8 == summary["trained_samples"] == 30 * 32 * 8
    steps = [line["step"] for line in read_metrics(run / "metrics.jsonl")]
    assert steps == list(range(31))
    assert len(list((run / "plots").glob("*.png"))) >= 6
    assert "| " in (run / "rewrites.md").read_text()
    assert list(run.glob("wandb/offline-run-*/*.wandb")), "W&B recorded the run without a network"
    for log in (run / "logs").glob("*.log"):
        assert "Traceback" not in log.read_text(), log
    assert processes_of(folder) == []


@pytest.mark.timeout(900)
def test_ctrl_c_saves_and_resume_goes_on_from_the_same_version(folder: Path) -> None:
    run = folder / "runs" / "interrupted"
    process = train(folder, "interrupted", "learner.steps=200", "learner.checkpoint_every=1000")
    deadline = time.monotonic() + 400
    while not (run / "metrics.jsonl").exists() or '"step":3' not in (run / "metrics.jsonl").read_text():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.2)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    output = finish(process, status=130, seconds=60)
    assert time.monotonic() - began < 15
    assert "Interrupted and saved" in output
    assert processes_of(folder) == []
    last = read_metrics(run / "metrics.jsonl")[-1]["step"]
    (checkpoint,) = sorted((run / "checkpoints").iterdir())
    assert checkpoint.name.startswith(f"step-{last:08d}")
    finish(train(folder, "interrupted", f"learner.steps={last + 2}", resume=True))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    versions = [line["version"] for line in lines if "version" in line]
    assert versions == [float(version) for version in range(1, last + 3)], "no version twice, none left out"
    summary = read_summary(run / "summary.json")
    assert summary["ledger"]["trained"] == (last + 2) * 32
