"""Which roles a run has: decisions played against an adversary, then carried out on real processes."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from deploy.fleet import ELASTIC, Drain, Ended, Fleet, Kind, Start
from deploy.processes import LocalRole, RoleSpec
from deploy.restarts import FAILURE_FORGIVEN_S, HOPELESS, KILL_FORGIVEN_S, LONGEST_PAUSE_S, RestartRule, learner_end
from deploy.supervisor import Role, Supervisor, describe_end

KILLED = -signal.SIGKILL


# ---------------------------------------------------------------------- restarts


def test_a_role_killed_now_and_then_is_never_given_up() -> None:
    rule = RestartRule()
    for _ in range(1000):
        assert rule.pause_after(KILLED, KILL_FORGIVEN_S + 0.1) == 0.5
    for _ in range(9):  # chaos can strike the same role several times in a row
        assert rule.pause_after(KILLED, 3.0) is not None
    assert rule.pause_after(KILLED, KILL_FORGIVEN_S + 0.1) == 0.5, "and it starts anew after one good life"


def test_a_role_that_fails_at_once_is_given_up_soon() -> None:
    rule = RestartRule()
    pauses = [rule.pause_after(1, 2.0) for _ in range(6)]
    assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0, None]


def test_a_role_that_fails_after_a_slow_start_is_given_up_too() -> None:
    """An engine may need minutes to find out that it cannot load the model; that is not a good life."""
    rule = RestartRule()
    assert [rule.pause_after(1, FAILURE_FORGIVEN_S - 1) for _ in range(6)][-1] is None
    assert RestartRule().pause_after(1, FAILURE_FORGIVEN_S + 1) == 0.5


def test_pauses_have_an_end() -> None:
    rule = RestartRule()
    pauses = [rule.pause_after(KILLED, 1.0) for _ in range(10)]
    assert pauses[-1] == LONGEST_PAUSE_S
    assert rule.pause_after(KILLED, 1.0) is None


@pytest.mark.parametrize(
    ("status", "ranks", "error", "end"),
    [
        (0, 1, "", "completed"),
        (130, 1, "", "stopped"),
        (143, 1, "", "stopped"),
        (KILLED, 1, "", "again"),
        (-signal.SIGSEGV, 4, "", "again"),
        (1, 1, "no space left", "failed"),
        (1, 1, "", "failed"),
        (1, 2, "", "again"),
        (1, 2, "no space left", "failed"),
    ],
)
def test_what_the_end_of_the_learner_means(status: int, ranks: int, error: str, end: str) -> None:
    assert learner_end(status, ranks, error) == end


# ---------------------------------------------------------------------- the fleet


def started(fleet: Fleet, now: float) -> list[str]:
    return [action.name for action in fleet.actions(now) if isinstance(action, Start)]


def fleet_of(actors: int) -> Fleet:
    fleet = Fleet()
    fleet.add("broker", "broker")
    fleet.scale("actor", actors)
    fleet.add("learner", "learner")
    return fleet


def test_roles_start_once_and_in_order() -> None:
    fleet = fleet_of(2)
    assert started(fleet, 0.0) == ["broker", "actor-0", "actor-1", "learner"]
    assert fleet.actions(0.0) == []


def test_a_dead_role_is_started_again_after_its_pause_and_holds_up_nobody() -> None:
    fleet = fleet_of(2)
    started(fleet, 0.0)
    assert fleet.ended("actor-0", 1, "", 1.0) == Ended("again", 0.5)
    assert fleet.ended("broker", KILLED, "", 1.2) == Ended("again", 0.5)
    assert started(fleet, 1.4) == []
    assert started(fleet, 1.6) == ["actor-0"]
    assert started(fleet, 1.8) == ["broker"]


def test_scaling_down_drains_the_youngest_and_frees_their_names() -> None:
    fleet = fleet_of(1)
    started(fleet, 0.0)
    fleet.scale("actor", 4)
    assert started(fleet, 1.0) == ["actor-1", "actor-2", "actor-3"]
    fleet.scale("actor", 2)
    assert fleet.actions(2.0) == [Drain("actor-3"), Drain("actor-2")]
    fleet.scale("actor", 3)
    assert started(fleet, 3.0) == ["actor-4"], "the names of those who leave are still theirs"
    assert fleet.ended("actor-2", 0, "", 4.0) == Ended("left")
    assert fleet.ended("actor-3", KILLED, "", 4.0) == Ended("left"), "killed after its grace: not started again"
    fleet.scale("actor", 4)
    assert started(fleet, 5.0) == ["actor-2"]


def test_a_role_that_waits_for_its_restart_can_be_scaled_away() -> None:
    fleet = fleet_of(2)
    started(fleet, 0.0)
    fleet.ended("actor-1", KILLED, "", 1.0)
    fleet.scale("actor", 1)
    assert fleet.actions(100.0) == []
    assert "actor-1" not in fleet.members


def test_the_learner_ends_the_run_and_nothing_is_started_after() -> None:
    fleet = fleet_of(1)
    started(fleet, 0.0)
    fleet.ended("actor-0", KILLED, "", 1.0)
    assert fleet.ended("learner", 0, "", 1.0).verdict == "completed"
    assert fleet.outcome == "completed"
    fleet.scale("actor", 5)
    assert fleet.actions(100.0) == []


def test_who_leaves_at_the_end_is_not_missed_but_before_it_is() -> None:
    fleet = fleet_of(2)
    started(fleet, 0.0)
    assert fleet.ended("actor-0", 0, "", 1.0).verdict == "again", "somebody asked it to leave: the wish stands"
    fleet.finish()
    assert fleet.ended("actor-1", 0, "", 2.0).verdict == "left"
    assert started(fleet, 100.0) == ["actor-0"]


def test_a_role_that_dies_again_and_again_ends_the_run() -> None:
    fleet = fleet_of(1)
    now, verdict = 0.0, ""
    while verdict != "gave up":
        started(fleet, now)
        verdict = fleet.ended("actor-0", 1, "", now + 1).verdict
        now += 20
        assert now < 200
    assert fleet.outcome == "failed"


def test_a_role_that_says_it_is_hopeless_ends_the_run_at_once_unless_it_was_leaving() -> None:
    fleet = fleet_of(2)
    started(fleet, 0.0)
    fleet.scale("actor", 1)
    assert fleet.ended("actor-1", HOPELESS, "it is broken", 1.0) == Ended("left")
    assert fleet.outcome is None
    assert fleet.ended("actor-0", HOPELESS, "it is broken", 1.0) == Ended("hopeless")
    assert (fleet.outcome, fleet.actions(100.0)) == ("failed", [])


class FleetAgainstAdversary(RuleBasedStateMachine):
    """Any interleaving of wishes, deaths, drains and time; `alive` are the processes a supervisor would have."""

    def __init__(self) -> None:
        super().__init__()
        self.fleet = Fleet()
        self.fleet.add("broker", "broker")
        self.fleet.add("learner", "learner")
        self.wanted: dict[Kind, int] = dict.fromkeys(ELASTIC, 0)
        self.alive: dict[str, float] = {}
        self.asked: set[str] = set()
        self.now = 0.0

    def can_go_on(self) -> bool:
        return self.fleet.outcome is None

    @precondition(can_go_on)
    @rule(kind=st.sampled_from(ELASTIC), count=st.integers(0, 6))
    def wish(self, kind: Kind, count: int) -> None:
        before = [member.name for member in self.fleet.present(kind)]
        self.fleet.scale(kind, count)
        after = [member.name for member in self.fleet.present(kind)]
        assert after[: len(before)] == before[:count], "the oldest stay"
        self.wanted[kind] = count

    @rule(seconds=st.floats(0.0, 40.0))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def act(self) -> None:
        for action in self.fleet.actions(self.now):
            match action:
                case Start(name):
                    assert self.fleet.outcome is None
                    assert name not in self.alive, "one process per role"
                    self.alive[name] = self.now
                case Drain(name):
                    assert name in self.alive
                    assert name not in self.asked, "asked once"
                    self.asked.add(name)

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), status=st.sampled_from([0, 1, KILLED, 130]))
    def ends(self, data: st.DataObject, status: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.alive)))
        lived_s = self.now - self.alive.pop(name)
        leaving = self.fleet.members[name].phase == "draining"
        before = self.fleet.outcome
        ended = self.fleet.ended(name, status, "", self.now)
        if leaving:
            assert ended.verdict == "left"
            self.asked.discard(name)
        elif ended.verdict == "gave up":
            assert lived_s <= FAILURE_FORGIVEN_S
        elif name != "learner":
            assert ended.verdict == "again"
            assert 0 < ended.pause_s <= LONGEST_PAUSE_S
        if name != "learner" and ended.verdict != "gave up":
            assert self.fleet.outcome == before, "only the learner, or a hopeless role, ends a run"

    @precondition(can_go_on)
    @invariant()
    def as_many_as_wished_for(self) -> None:
        for kind, count in self.wanted.items():
            assert len(self.fleet.present(kind)) == count

    @invariant()
    def every_process_is_accounted_for(self) -> None:
        up = {name for name, member in self.fleet.members.items() if member.phase in ("up", "draining")}
        assert up == set(self.alive)


FleetAgainstAdversary.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestFleet = FleetAgainstAdversary.TestCase


# ---------------------------------------------------------------------- carried out

SCRIPTS = {
    "patient": "import time\nwhile True: time.sleep(0.05)",
    "polite": "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
    "print('ready', flush=True)\nwhile True: time.sleep(0.02)",
    "failing": "import sys\nprint('error: the disk is full', flush=True)\nsys.exit(1)",
    "hopeless": "import sys\nprint('error: the metric m:f fails', flush=True)\nsys.exit(78)",
    "done": "pass",
}


class ScriptRole(LocalRole):
    """A real process that runs a few lines of Python instead of a role."""

    def __init__(self, name: str, script: str, folder: Path) -> None:
        super().__init__(RoleSpec(name, (), folder / f"{name}.log"))
        self.child.command = (sys.executable, "-c", SCRIPTS[script])


def supervisor(folder: Path, scripts: dict[str, str], warnings: list[str]) -> Supervisor:
    def make(kind: Kind, name: str) -> Role:
        return ScriptRole(name, scripts.get(name, scripts.get(kind, "polite")), folder)

    return Supervisor(Fleet(), make, warnings.append)


async def until(reached: object, seconds: float = 15.0) -> None:
    assert callable(reached)
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


async def test_a_killed_process_comes_back_while_the_others_run_on(tmp_path: Path) -> None:
    warnings: list[str] = []
    boss = supervisor(tmp_path, {}, warnings)
    boss.fleet.add("broker", "broker")
    boss.fleet.add("learner", "learner")
    boss.fleet.scale("actor", 2)
    running = asyncio.create_task(boss.run())
    try:
        await until(lambda: len(boss.roles) == 4 and all(role.running for role in boss.roles.values()))
        pids = {name: role.pid for name, role in boss.roles.items()}
        for name, number in (("actor-0", signal.SIGKILL), ("broker", signal.SIGKILL), ("learner", signal.SIGKILL)):
            os.kill(pids[name] or 0, number)
        os.kill(pids["actor-1"] or 0, signal.SIGSTOP)
        await until(lambda: boss.roles["learner"].pid != pids["learner"] and boss.roles["learner"].running)
        await until(lambda: boss.roles["actor-0"].pid != pids["actor-0"] and boss.roles["broker"].running)
        assert boss.roles["actor-1"].pid == pids["actor-1"], "a stopped process has not ended"
        os.kill(pids["actor-1"] or 0, signal.SIGKILL)
        await until(lambda: boss.roles["actor-1"].pid != pids["actor-1"])
        assert any("learner is started again, it was killed by SIGKILL" in line for line in warnings)
    finally:
        running.cancel()
        await boss.stop_all(5.0)
    assert not any(role.running for role in boss.roles.values())


async def test_scaling_real_processes(tmp_path: Path) -> None:
    boss = supervisor(tmp_path, {}, [])
    boss.fleet.add("learner", "learner")
    boss.fleet.scale("actor", 1)
    running = asyncio.create_task(boss.run())
    try:
        await until(lambda: len(boss.roles) == 2)
        boss.fleet.scale("actor", 3)
        await until(lambda: len(boss.roles) == 4 and all((tmp_path / f"actor-{n}.log").exists() for n in range(3)))
        await until(lambda: all("ready" in (tmp_path / f"actor-{n}.log").read_text() for n in range(3)))
        leaver = boss.roles["actor-2"]
        boss.fleet.scale("actor", 2)
        await until(lambda: "actor-2" not in boss.roles)
        assert leaver.returncode == 0, "it was asked, not killed"
        assert {"actor-0", "actor-1", "learner"} == set(boss.roles)
    finally:
        running.cancel()
        await boss.stop_all(5.0)


async def test_an_error_of_the_learner_ends_the_run_with_its_words(tmp_path: Path) -> None:
    boss = supervisor(tmp_path, {"learner": "failing"}, [])
    boss.fleet.add("learner", "learner")
    assert await asyncio.wait_for(boss.run(), 20) == "failed"
    assert "status 1: the disk is full" in boss.failure
    assert "learner.log" in boss.failure
    await boss.stop_all(1.0)


async def test_a_hopeless_role_ends_the_run_with_its_words(tmp_path: Path) -> None:
    warnings: list[str] = []
    boss = supervisor(tmp_path, {"rewarder": "hopeless"}, warnings)
    boss.fleet.add("learner", "learner")
    boss.fleet.scale("rewarder", 1)
    assert await asyncio.wait_for(boss.run(), 20) == "failed"
    assert boss.failure == f"rewarder-0 cannot go on: the metric m:f fails (log: {tmp_path / 'rewarder-0.log'})"
    assert warnings == []
    await boss.stop_all(1.0)


async def test_the_run_is_complete_when_the_learner_is(tmp_path: Path) -> None:
    boss = supervisor(tmp_path, {"learner": "done", "actor": "patient"}, [])
    boss.fleet.add("learner", "learner")
    boss.fleet.scale("actor", 1)
    assert await asyncio.wait_for(boss.run(), 20) == "completed"
    await boss.stop_all(0.2)
    assert not boss.roles["actor-0"].running


async def test_a_machine_that_refuses_a_process_counts_as_a_death(tmp_path: Path) -> None:
    warnings: list[str] = []
    boss = supervisor(tmp_path, {}, warnings)
    boss.fleet.add("learner", "learner")
    boss.fleet.scale("actor", 1)
    (tmp_path / "actor-0.log").mkdir()  # its log cannot be opened
    running = asyncio.create_task(boss.run())
    await until(lambda: any("actor-0 is started again, it cannot start" in line for line in warnings))
    running.cancel()
    await boss.stop_all(5.0)


def test_ends_are_told_in_words() -> None:
    assert describe_end(-9, "") == "was killed by SIGKILL"
    assert describe_end(-250, "") == "was killed by signal 250"
    assert describe_end(1, "no broker") == "ended with status 1: no broker"
    assert describe_end(3, "") == "ended with status 3"


def test_a_drain_that_was_not_carried_out_does_not_hit_the_next_of_that_name() -> None:
    """Found by the machine above: the drained role ended by itself before anybody had asked it."""
    fleet = fleet_of(1)
    started(fleet, 0.0)
    fleet.scale("actor", 0)
    fleet.ended("actor-0", 0, "", 1.0)
    fleet.scale("actor", 1)
    assert fleet.actions(2.0) == [Start("actor-0")]
