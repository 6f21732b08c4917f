"""A real run whose processes die, and whose fleet grows and shrinks: it comes to its end and the audit balances."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.deploy.small_run import MAX_STALENESS, ROOT, SMALL, SmallRun
from tests.tiny_model import build_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def run(demo_folder: Path, request: pytest.FixtureRequest) -> Iterator[SmallRun]:
    name, settings = request.param
    small = SmallRun(demo_folder, name, [*SMALL, *settings])
    yield small.start()
    small.end()


def deepretrieval(run: SmallRun, *arguments: str, status: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "deploy.cli", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=run.environment,
        timeout=300,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("run", [("struck", ["learner.steps=12", "rewarder.count=2"])], indirect=True)
def test_every_role_is_killed_and_the_run_comes_to_its_end(run: SmallRun) -> None:
    run.wait_for_step(2)
    run.kill("learner")
    run.wait_for_step(4)
    run.kill("broker")
    run.kill("rewarder-1")
    run.wait_for_step(6)
    run.kill("actor-0")
    run.kill("search-server")
    run.wait_for_step(8)
    stopped = run.role("learner")
    assert stopped is not None
    assert stopped.pid is not None
    os.kill(stopped.pid, signal.SIGSTOP)  # killed while it is stopped
    os.kill(stopped.pid, signal.SIGKILL)
    run.finish()
    log = run.launcher_log()
    for name in ("learner", "broker", "rewarder-1", "actor-0", "search-server"):
        assert f"{name} is started again, it was killed by SIGKILL" in log
    run.assert_balanced(steps=12)
    assert run.processes() == []


@pytest.mark.parametrize("run", [("stopped", ["learner.steps=8", "broker.lease_s=4"])], indirect=True)
def test_a_broker_that_stands_still_for_longer_than_a_lease_goes_on_where_it_was(run: SmallRun) -> None:
    run.wait_for_step(2)
    broker = run.role("broker")
    assert broker is not None
    assert broker.pid is not None
    process = psutil.Process(broker.pid)
    process.suspend()
    stands_at = run.step()
    run.wait_for(lambda: (state := run.role("broker")) is not None and state.state == "stalled", seconds=60)
    assert run.step() <= stands_at + MAX_STALENESS + 1, "no more than what had arrived"
    process.resume()
    run.finish()
    assert "broker is started again" not in run.launcher_log()
    run.assert_balanced(steps=8)
    assert run.processes() == []


def test_a_rank_is_killed_and_the_learner_is_started_again(demo_folder: Path) -> None:
    model = build_tiny_model(demo_folder / "tiny", seed=0)  # learns nothing: every reward is the same
    settings = [f"model.path={model}", "algorithm.filter_zero_variance=false", "sampling.max_tokens=16"]
    run = SmallRun(demo_folder, "ranks", [*SMALL, *settings, "learner.steps=5", "learner.processes=2"]).start()
    try:
        run.wait_for_step(2)
        learner = run.role("learner")
        assert learner is not None
        assert learner.pid is not None
        ranks = {rank.environ()["RANK"]: rank for rank in psutil.Process(learner.pid).children()}
        assert sorted(ranks) == ["0", "1"]
        ranks["1"].kill()
        run.finish()
    finally:
        run.end()
    assert "learner is started again, it ended with status 1: rank 1 (process " in run.launcher_log()
    run.assert_balanced(steps=5)
    assert run.processes() == []


@pytest.mark.parametrize("run", [("scaled", ["learner.steps=1000"])], indirect=True)
def test_a_fleet_that_grows_and_shrinks_changes_nothing_in_the_audit(run: SmallRun, demo_folder: Path) -> None:
    run.wait_for_step(2)
    told = deepretrieval(run, "scale", str(run.folder.path), "--actors", "6", "--rewarders", "3")
    assert "actors: 1 → 6, started actor-1, actor-2, actor-3, actor-4, actor-5" in told
    settings = [f"run.name={run.folder.path.name}", f"run.root={run.folder.path.parent}", *SMALL]
    told = deepretrieval(run, "train", str(ROOT / "configs" / "demo.yaml"), *settings, status=1)
    assert "live already" in told, "a second launcher is refused"
    run.wait_for_step(run.step() + 3)
    told = deepretrieval(run, "scale", str(run.folder.path), "--actors", "2")
    assert "actors: 6 → 2, drained actor-2, actor-3, actor-4, actor-5" in told
    run.wait_for_step(run.step() + 3)
    assert run.launcher is not None
    run.launcher.send_signal(signal.SIGINT)
    assert "Interrupted and saved" in run.finish(status=130)
    for name in ("actor-1", "actor-5"):
        assert "Traceback" not in (run.folder.logs / f"{name}.log").read_text()
    steps = run.step() + 2
    resumed = SmallRun(demo_folder, "scaled", [*SMALL, f"learner.steps={steps}"], ("train", "--resume")).start()
    try:
        resumed.wait_for(lambda: resumed.role("rewarder-0") is not None)
        assert [resumed.role(name) for name in ("actor-1", "rewarder-1")] == [None, None], "the config's numbers"
        resumed.finish()
    finally:
        resumed.end()
    resumed.assert_balanced(steps)
    assert resumed.processes() == []
