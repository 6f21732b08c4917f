"""`scale` and `status` of a live run: a real broker, real rewarders, real locks; only the learner is a sleeper."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from common.config import Config, load_config, to_yaml
from common.messages import StatusReply
from common.run_folder import RunFolder
from common.transport.keys import create_run_keys, load_run_keys
from deploy.errors import LaunchError
from deploy.fleet import Fleet, Kind
from deploy.fleet_watch import FleetWatch
from deploy.live_run import RunLock, RunReport, is_live, read_report, read_wish, write_report, write_wish
from deploy.processes import LocalRole, RoleSpec
from deploy.role_specs import RoleSpecs, endpoint_of
from deploy.role_states import RoleState
from deploy.scale import changes
from deploy.sites import free_port
from deploy.supervisor import Role, Supervisor

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


# ---------------------------------------------------------------------- lock, wish, report


def test_a_run_has_one_launcher(tmp_path: Path) -> None:
    assert not is_live(tmp_path)
    with RunLock(tmp_path):
        assert is_live(tmp_path)
        with pytest.raises(LaunchError, match=rf"live already \(process {os.getpid()} on "), RunLock(tmp_path):
            pass
    assert not is_live(tmp_path)


def test_a_lock_dies_with_its_holder_and_looking_at_it_disturbs_nobody(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom deploy.live_run import RunLock\n"
        "with RunLock(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    assert is_live(tmp_path)
    holder.kill()
    holder.wait()
    assert not is_live(tmp_path)
    for _ in range(200):  # each takes the lock for an instant
        is_live(tmp_path)
    with RunLock(tmp_path):
        assert is_live(tmp_path)


def test_a_launcher_forgets_the_wishes_of_an_earlier_one(tmp_path: Path) -> None:
    write_wish(tmp_path, 5, None)
    write_report(tmp_path, RunReport([]))
    with RunLock(tmp_path):
        assert read_wish(tmp_path) is None
        assert read_report(tmp_path) is None


def test_wishes_are_bounded(tmp_path: Path) -> None:
    wish = write_wish(tmp_path, 3, None)
    assert read_wish(tmp_path) == wish
    (tmp_path / "fleet.json").write_text('{"serial": 1, "actors": 100000}')
    with pytest.raises(LaunchError, match=r"fleet\.json"):
        read_wish(tmp_path)


def test_what_has_changed_is_told_in_words(tmp_path: Path) -> None:
    def report(*names: str) -> RunReport:
        return RunReport([RoleState(name, "actor", "running") for name in names])

    lines = changes(report("actor-0", "actor-1"), report("actor-0"), write_wish(tmp_path, 1, None))
    assert lines == ["actors: 2 → 1, drained actor-1"]
    lines = changes(report("actor-0"), report("actor-0", "actor-1"), write_wish(tmp_path, 2, None))
    assert lines == ["actors: 1 → 2, started actor-1"]


# ---------------------------------------------------------------------- a live run


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run folder as a launcher leaves it, for a run whose search engine is never asked."""
    (tmp_path / "config.yaml").write_text(
        "data: {corpus: /nowhere}\nmodel: {path: /nowhere}\nsearch: {url: 'http://127.0.0.1:9', quota: {requests: 3}}\n"
        f"broker: {{port: {free_port('127.0.0.1')}, heartbeat_s: 0.2}}\nrewarder: {{count: 1}}\n"
    )
    folder = RunFolder(tmp_path)
    folder.config.write_text(to_yaml(load_config(folder.config)))
    create_run_keys(folder.keys)
    return folder


class Sleeper(LocalRole):
    """In the learner's place: a process that does nothing."""

    def __init__(self, spec: RoleSpec) -> None:
        super().__init__(spec)
        self.child.command = (sys.executable, "-c", "import time\nwhile True: time.sleep(0.1)")


@contextlib.asynccontextmanager
async def launched(folder: RunFolder) -> AsyncIterator[Supervisor]:
    """What `LaunchedRun` does, with real broker and rewarders, and without training."""
    config: Config = load_config(folder.config)
    specs = RoleSpecs(config, folder, "127.0.0.1", resume=False, gpu_share=0.0)

    def make(kind: Kind, name: str) -> Role:
        spec = specs.of(kind, name)
        return Sleeper(spec) if kind == "learner" else LocalRole(spec)

    boss = Supervisor(Fleet(), make, lambda line: None)
    boss.fleet.add("broker", "broker")
    boss.fleet.add("learner", "learner")
    boss.fleet.scale("rewarder", config.rewarder.count)
    monitor = load_run_keys(folder.keys, "monitor")
    watch = FleetWatch(boss, endpoint_of(config), monitor, None, folder.path)
    with RunLock(folder.path):
        works = (boss.run(), watch.run(), watch.follow_wishes())
        tasks = [asyncio.create_task(work) for work in works]
        try:
            yield boss
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await boss.stop_all(5.0)


async def deepretrieval(*arguments: str) -> tuple[int, str, str]:
    """The command line: exit status, output, errors."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "deploy.cli", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=ENVIRONMENT,
    )
    output, errors = await asyncio.wait_for(process.communicate(), 90)
    assert process.returncode is not None
    assert "Traceback" not in errors.decode()
    return process.returncode, output.decode(), errors.decode()


async def test_scaling_rewarders_up_and_down_and_asking_for_the_status(folder: RunFolder) -> None:
    run = str(folder.path)
    async with launched(folder) as boss:
        status, output, errors = await deepretrieval("scale", run, "--rewarders", "3")
        assert status == 0, errors
        assert "rewarders: " in output
        assert "→ 3" in output
        assert sorted(boss.roles) == ["broker", "learner", "rewarder-0", "rewarder-1", "rewarder-2"]
        status, output, errors = await deepretrieval("status", run, "--json")
        told = json.loads(output)
        assert (status, told["answers"], told["launched"]) == (0, True, True), output
        states = {role["name"]: role["state"] for role in told["roles"]}
        assert states == {"broker": "running", "learner": "starting"} | {f"rewarder-{n}": "running" for n in range(3)}
        assert all(role["pid"] == boss.roles[role["name"]].pid for role in told["roles"])
        assert told["quota"] == {"requests": 3, "window_s": 1.0, "in_use": 0, "granted": 0, "refused": 0}
        assert set(told["stages"]) == {"rollout", "score", "train"}
        leavers = [boss.roles["rewarder-1"], boss.roles["rewarder-2"]]
        status, output, errors = await deepretrieval("scale", run, "--rewarders", "1")
        assert status == 0, errors
        assert output == "rewarders: 3 → 1, drained rewarder-1, rewarder-2\n"
        assert [role.returncode for role in leavers] == [0, 0]
        status, output, _ = await deepretrieval("status", run)
        assert status == 0
        assert "rewarder-0" in output
        assert "rewarder-1" not in output


async def test_a_stopped_role_is_reported_with_an_exit_status(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.role_states.SILENT_AFTER_S", 1.0)  # in the launcher, which is this process
    async with launched(folder) as boss:
        await deepretrieval("scale", str(folder.path), "--rewarders", "2")
        os.kill(boss.roles["rewarder-1"].pid or 0, signal.SIGSTOP)
        deadline = time.monotonic() + 20
        while not any(state.state == "silent" for state in (read_report(folder.path) or RunReport([])).roles):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.2)
        status, output, _ = await deepretrieval("status", str(folder.path))
        assert status == 1
        assert "rewarder-1 is silent: no sign of life" in output
        os.kill(boss.roles["rewarder-1"].pid or 0, signal.SIGKILL)  # its successor is no trouble
        while any(state.state == "silent" for state in (read_report(folder.path) or RunReport([])).roles):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.2)


async def test_without_a_broker_the_status_is_2(folder: RunFolder) -> None:
    status, output, _ = await deepretrieval("status", str(folder.path))
    assert status == 2
    assert "does not answer" in output
    status, output, _ = await deepretrieval("status", str(folder.path), "--json")
    assert status == 2
    assert json.loads(output)["answers"] is False


async def test_what_cannot_be_scaled_or_asked_is_said(folder: RunFolder, tmp_path: Path) -> None:
    for arguments, words in (
        (("scale", str(folder.path), "--actors", "2"), "not live"),
        (("scale", str(folder.path)), "say how many"),
        (("scale", str(tmp_path / "nothing"), "--actors", "2"), "not a run's folder"),
        (("status", str(tmp_path / "keys")), "config.yaml is missing"),
    ):
        status, _, errors = await deepretrieval(*arguments)
        assert status == 1
        assert words in errors
    status, _, errors = await deepretrieval("scale", str(folder.path), "--actors", "-1")
    assert status == 2
    assert "is no number" in errors


async def test_a_fleet_that_does_not_get_there_is_an_error(folder: RunFolder) -> None:
    with RunLock(folder.path):  # a launcher that is stuck
        status, _, errors = await deepretrieval("scale", str(folder.path), "--actors", "2", "--timeout", "1")
    assert status == 1
    assert "the launcher has not taken it up" in errors


async def test_a_watch_ends_even_if_its_cancellation_meets_an_answer(folder: RunFolder) -> None:
    """Python 3.11's `wait_for` returns an answer that arrives with a cancellation, and forgets the latter."""

    class Answering:
        state = None

        async def fleet_status(self, timeout_s: float) -> StatusReply:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                return StatusReply({}, (), 0, 0, 0)
            raise AssertionError("nobody cancelled it")

        async def wait_for_state(self, satisfied: object) -> None:
            await asyncio.sleep(60)

    boss = Supervisor(Fleet(), lambda kind, name: LocalRole(RoleSpec(name, (), folder.logs / "x")), lambda line: None)
    watch = FleetWatch(boss, "tcp://127.0.0.1:1", load_run_keys(folder.keys, "monitor"), None, folder.path)
    task = asyncio.create_task(watch._ask(Answering()))  # type: ignore[arg-type]
    await asyncio.sleep(0.05)
    task.cancel()
    done, _ = await asyncio.wait({task}, timeout=5)
    assert done
    assert task.cancelled()
