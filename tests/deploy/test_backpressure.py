"""A learner that stands still for a minute: everybody waits, nobody's memory grows, and all goes on after."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.deploy.small_run import SMALL, SmallRun

PAUSE_S = 60.0
SETTLE_S = 10.0  # what is under way when the learner stops is finished first
GROWTH_MIB = 16.0
ROLES = ("learner", "broker", "actor-0", "actor-1", "rewarder-0")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def process_of(run: SmallRun, name: str) -> psutil.Process:
    state = run.role(name)
    assert state is not None
    assert state.pid is not None
    return psutil.Process(state.pid)


def memory_mib(roles: dict[str, psutil.Process]) -> dict[str, float]:
    return {name: process.memory_info().rss / 2**20 for name, process in roles.items()}


def test_a_paused_learner_leaves_memory_flat(demo_folder: Path) -> None:
    run = SmallRun(demo_folder, "paused", (*SMALL, "learner.steps=1000", "actor.count=2")).start()
    try:
        run.wait_for_step(5)
        roles = {name: process_of(run, name) for name in ROLES}
        roles["learner"].suspend()
        time.sleep(SETTLE_S)
        before, step = memory_mib(roles), run.step()
        time.sleep(PAUSE_S)
        after = memory_mib(roles)
        assert run.step() == step
        roles["learner"].resume()
        run.wait_for_step(step + 3, seconds=60)
        assert all(process_of(run, name) == process for name, process in roles.items()), "nobody had to be replaced"
        assert run.launcher is not None
        run.launcher.send_signal(signal.SIGINT)
        run.finish(status=130, seconds=60)
    finally:
        run.end()
    grown = {name: after[name] - before[name] for name in before}
    assert max(grown.values()) < GROWTH_MIB, grown
