"""A learner that stands still for a minute: everybody waits, nobody's memory grows, and all goes on after."""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path

import psutil
import pytest

from deploy.status import ask
from tests.deploy.small_run import GROUPS_PER_STEP, MAX_STALENESS, SMALL, SmallRun

PAUSE_S = 60.0
SETTLE_S = 10.0  # what is under way when the learner stops is finished first
GROWTH_MIB = 16.0
OUTSTANDING = (MAX_STALENESS + 1) * GROUPS_PER_STEP  # groups that the learner admits
GROUP_BYTES = 64 << 10  # a group of the demo has 8 samples of a few dozen tokens: some 5 KiB
ROLES = ("learner", "broker", "actor-0", "actor-1", "rewarder-0")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def process_of(run: SmallRun, name: str) -> psutil.Process:
    state = run.role(name)
    assert state is not None
    assert state.pid is not None
    return psutil.Process(state.pid)


def memory_mib(roles: dict[str, psutil.Process]) -> dict[str, float]:
    return {name: process.memory_info().rss / 2**20 for name, process in roles.items()}


def queues(run: SmallRun) -> dict[str, tuple[int, int]]:
    """Groups and bytes that each stage of the broker holds, as the broker says."""
    status = asyncio.run(ask(run.folder))
    assert status.answers
    return {name: (stage["queued"] + stage["leased"], stage["bytes"]) for name, stage in status.stages.items()}


def test_a_paused_learner_leaves_memory_flat(demo_folder: Path) -> None:
    run = SmallRun(demo_folder, "paused", (*SMALL, "learner.steps=1000", "actor.count=2")).start()
    try:
        run.wait_for_step(5)
        roles = {name: process_of(run, name) for name in ROLES}
        roles["learner"].suspend()
        time.sleep(SETTLE_S)
        before, step = memory_mib(roles), run.step()
        held = [queues(run)]
        for _ in range(6):
            time.sleep(PAUSE_S / 6)
            held.append(queues(run))
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
    assert all(state == held[0] for state in held), "everything waits: no queue grows or shrinks"
    assert held[0]["train"][0] > 0, "the paused learner is what all wait for"
    groups, size = (sum(stage[n] for stage in held[0].values()) for n in (0, 1))
    assert groups <= OUTSTANDING
    assert size <= groups * GROUP_BYTES
    grown = {name: after[name] - before[name] for name in before}
    assert max(grown.values()) < GROWTH_MIB, grown
