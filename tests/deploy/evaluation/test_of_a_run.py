"""Acceptance: evaluating a run's model gives the run's own held-out figure, also when it is killed on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.tracking.heldout import read_heldout
from tests.deploy.small_run import MODEL, SmallRun

STEPS = 2


def evaluate(run: SmallRun, out: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "deploy.cli", "eval", str(run.folder.path), "--out", str(out), *options]
    return subprocess.Popen(
        command, env=run.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=out.parent
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    return output


def recalls(out: Path) -> dict[str, float]:
    lines = [json.loads(line) for line in (out / "queries.jsonl").read_text().splitlines()]
    return {line["id"]: line["samples"][0].get("metrics", {}).get("recall", 0.0) for line in lines}


@pytest.mark.slow
def test_the_figure_is_the_runs_own_also_after_a_kill(demo_folder: Path, tmp_path: Path) -> None:
    settings = (*MODEL, f"learner.steps={STEPS}", "learner.groups_per_step=4", "learner.checkpoint_every=2")
    run = SmallRun(demo_folder, "evaluated", (*settings, "data.heldout_limit=64")).start()
    try:
        run.finish()
    finally:
        run.end()
    own = {row.id: row.value for row in read_heldout(run.folder.heldout / "trained.json").rows}
    assert len(own) == 64

    whole = tmp_path / "whole"
    finish(evaluate(run, whole))
    assert recalls(whole) == own
    results = json.loads((whole / "results.json").read_text())
    assert results["model"] == f"evaluated@{STEPS}"
    own_mean = json.loads(run.folder.summary.read_text())["heldout_recall_trained"]
    assert results["methods"][results["model"]]["metrics"]["recall"]["mean"] == pytest.approx(own_mean, abs=1e-12)

    out = tmp_path / "killed"
    small = ("actor.concurrent_groups=1", "sampling.group_size=2")  # two at a time, so that it can be met half-way
    process = evaluate(run, out, *small)
    written = out / "queries.jsonl"
    deadline = time.monotonic() + 300
    while not written.exists() or written.stat().st_size == 0:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    before = written.read_bytes()
    assert 0 < before.count(b"\n") < 64
    written.write_bytes(before + b'{"id": "q08')  # what a kill in the middle of a write leaves
    assert "an unfinished line was cut off" in finish(evaluate(run, out, *small))
    assert written.read_bytes().startswith(before), "finished requests are not done again"
    assert recalls(out) == own
    assert len(written.read_bytes().splitlines()) == 64
