"""The demo under Ray, on three nodes of one machine: a node is lost, another joins, and the audit balances."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from benchmarks.ray_nodes import ENVIRONMENT, Nodes
from deploy.errors import LaunchError
from deploy.ray_host import NODE_DIGITS, file_marks, unseen_files
from deploy.ray_site import RaySite, gpu_share
from tests.deploy.small_run import ROOT, SMALL, SmallRun

STEPS = 12
SETTINGS = (*SMALL, f"learner.steps={STEPS}", "actor.threads=2", "rewarder.count=2")


def test_files_that_a_node_does_not_have_are_named(tmp_path: Path) -> None:
    config, keys = tmp_path / "config.yaml", tmp_path / "public.json"
    config.write_text("a")
    keys.write_text("b")
    marks = file_marks([config, keys])
    assert unseen_files(marks) == []
    config.write_text("another run's")
    keys.unlink()
    assert unseen_files(marks) == [str(config), str(keys)]


@pytest.mark.parametrize(
    ("gpus", "wanting", "share"), [(0, 3, 0.0), (8, 5, 1.0), (1, 2, 0.5), (1, 3, 0.33), (0, 0, 0.0)]
)
def test_gpus_are_shared_out_equally(gpus: int, wanting: int, share: float) -> None:
    assert gpu_share(gpus, wanting) == share
    assert gpu_share(gpus, wanting) * wanting <= gpus


def test_a_missing_ray_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(LaunchError, match=r"pip install 'deepretrieval-async\[ray\]'"):
        RaySite.connect("auto")


def test_a_missing_cluster_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    (tmp_path / "ray_current_cluster").write_text("127.0.0.1:2")  # of a cluster that is gone
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for address, named in (("127.0.0.1:1", "127.0.0.1:1"), ("ray://127.0.0.1:1", "ray://"), ("auto", "127.0.0.1:2")):
        with pytest.raises(LaunchError, match=f"no Ray cluster at {named}"):
            RaySite.connect(address)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    pytest.importorskip("ray", reason="Ray is not installed")
    for variable, value in ENVIRONMENT.items():
        monkeypatch.setenv(variable, value)
    started = Nodes()
    yield started
    started.shutdown()


def node_of(run: SmallRun, name: str) -> str:
    """The id of the Ray node on which a role runs; "" while it has none."""
    state = run.role(name)
    return state.where.rpartition("node ")[2].rstrip(")") if state is not None and state.state == "running" else ""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_on_ray_is_scaled_while_it_runs(nodes: Nodes, demo_folder: Path) -> None:
    settings = (*SMALL, "learner.steps=1000", "actor.threads=1")
    run = SmallRun(demo_folder, "ray-scaled", settings, ("launch", "--on", "ray", "--address", nodes.address))
    run.start()
    try:
        run.wait_for_step(2)
        scale(run, "--actors", "2", "--rewarders", "3")
        run.wait_for(lambda: all(node_of(run, name) for name in ("actor-1", "rewarder-1", "rewarder-2")))
        run.wait_for_step(run.step() + 2)
        scale(run, "--actors", "1", "--rewarders", "1")
        assert [run.role(name) for name in ("actor-1", "rewarder-2")] == [None, None]
        run.wait_for_step(run.step() + 2)
        assert run.launcher is not None
        run.launcher.send_signal(signal.SIGINT)
        run.finish(status=130, seconds=120)
        steps = run.step() + 1
        more = (*settings, f"learner.steps={steps}")
        resumed = SmallRun(
            demo_folder, "ray-scaled", more, ("launch", "--on", "ray", "--address", nodes.address, "--resume")
        ).start()
        resumed.finish()
    finally:
        run.end()
    resumed.assert_balanced(steps)
    assert run.processes() == []


def scale(run: SmallRun, *wish: str) -> None:
    command = [sys.executable, "-m", "deploy.cli", "scale", str(run.folder.path), *wish]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=run.environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_survives_the_loss_of_a_node(nodes: Nodes, demo_folder: Path) -> None:
    command = ("launch", "--on", "ray", "--address", nodes.address)
    run = SmallRun(demo_folder, "ray", SETTINGS, command).start()
    try:
        run.wait_for_step(3)
        home, lost = node_of(run, "learner"), node_of(run, "actor-0")
        assert len(lost) == NODE_DIGITS
        assert lost != home == node_of(run, "broker") == node_of(run, "search-server")
        process = run.role("actor-0")
        assert process is not None
        assert process.pid is not None
        nodes.lose(lost)
        run.wait_for(lambda: not psutil.pid_exists(process.pid or 0), seconds=30)
        run.wait_for(lambda: (state := run.role("actor-0")) is not None and "waits for another" in state.phase)
        stands_at = run.step()
        assert stands_at < STEPS, "its only actor is gone: without a node for it the run cannot end"
        nodes.add(cpus=3)
        run.wait_for_step(stands_at + 1)
        assert node_of(run, "actor-0") not in ("", lost)
        run.finish()
    finally:
        run.end()
    assert "actor-0 goes on at" in run.launcher_log()
    run.assert_balanced(steps=STEPS)
    assert run.processes() == []
