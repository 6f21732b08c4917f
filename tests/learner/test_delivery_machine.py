"""The whole delivery under Hypothesis: whatever dies, stops, answers late, twice or garbage, the audit balances."""

from __future__ import annotations

import sys
from collections.abc import Callable

import hypothesis
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from common import messages as m
from common.broker.service import BrokerSettings
from tests.learner.delivery_simulation import (
    HEARTBEAT_S,
    SAMPLES,
    UNREADABLE,
    SimActor,
    SimRewarder,
    SimWorker,
    rollout,
    score_of,
)
from tests.learner.delivery_world import ZERO_VARIANCE, Pace, World

LEASE_S = 10.0
BAN_S = 5.0
CAPACITY = 2
CALM_S = 200  # so long after the last fault everything that was outstanding must have ended
NAMES: dict[str, type[SimWorker]] = {
    "actor-0": SimActor,
    "actor-1": SimActor,
    "actor-2": SimActor,
    "rewarder-0": SimRewarder,
    "rewarder-1": SimRewarder,
}
GARBAGE = ["unreadable", "another's lease", "unknown lease", "another ticket", "more samples", "a frame less"]
PICK = st.integers(0, 99)
LEARNER_OR_ANY = st.one_of(st.just(0), PICK)  # of `World.everybody`
SENT = st.integers(0, 4)
LOST = st.integers(0, 6)


def make_world(pace: Pace, queue_items: int = 100, bad_frames_allowed: int = 8) -> World:
    """A run whose processes have just started: their messages are all still on their way."""
    settings = BrokerSettings(
        epoch=1,
        lease_s=LEASE_S,
        heartbeat_s=HEARTBEAT_S,
        queue_items=queue_items,
        bad_frames_allowed=bad_frames_allowed,
        ban_s=BAN_S,
    )
    world = World(pace, settings)
    for name, kind in NAMES.items():
        world.start_worker(kind, name, CAPACITY)
    return world


def check_books(world: World) -> None:
    """Every position below the cursor has exactly one disposition in the surviving history, or is outstanding."""
    learner = world.learner
    state, lineage = learner.ledger.state(), learner.lineage
    trained, aside, outstanding = set(lineage.trained), lineage.aside, set(state.outstanding)
    assert set(state.set_aside.get(ZERO_VARIANCE, ())) == aside
    assert len(trained) + len(aside) + len(state.outstanding) == state.cursor
    assert trained | aside | outstanding == set(range(state.cursor))
    assert learner.ledger.outstanding <= (world.pace.max_staleness + 1) * world.pace.groups_per_step
    assert len(trained) == (learner.version + learner.in_training) * world.pace.groups_per_step


def check_broker(world: World) -> None:
    """An item is in one stage, and no queue is longer than its bound."""
    stages = world.wire.broker.stages.values()
    for position in range(world.learner.ledger.state().cursor):
        assert sum(position in stage for stage in stages) <= 1
    assert all(len(stage) <= world.settings.queue_items for stage in stages)


def end_faults(world: World) -> None:
    """Who is stopped goes on, messages flow, and of each role somebody is there."""
    for link in world.wire.links.values():
        link.slow_up = link.slow_down = False
    for process in world.everybody:
        process.running = True
    world.restart_the_dead()
    for name in ("actor-0", "rewarder-0"):
        if not any(type(worker) is NAMES[name] and not worker.leaving for worker in world.workers.values()):
            world.start_worker(NAMES[name], name, CAPACITY)


def run_to_the_end(world: World) -> None:
    """Without faults everything that is outstanding ends, and training goes on."""
    end_faults(world)
    due = set(world.learner.ledger.state().outstanding)
    goal = world.learner.version + 2
    for _ in range(CALM_S):
        world.run_fairly(1)
        check_books(world)
        ended = world.learner.lineage.trained.keys() | world.learner.lineage.aside
        if due <= ended and world.learner.version >= goal:
            return
    raise AssertionError(f"nothing moves any more: {sorted(due - ended)} of {sorted(due)} have not ended")


def garbage(kind: str, worker: SimWorker, world: World) -> tuple[m.ToBroker | None, m.Payload]:
    """What no worker must send; where it has the form of an answer, its text is `forged`."""
    held = [task.assignment.lease for task in worker.tasks] or [m.LeaseRef(worker.stage, 0, 1)]
    lease, samples = held[0], SAMPLES
    if kind == "unreadable":
        return UNREADABLE, ()
    if kind == "another's lease":
        theirs = [lease for other in world.workers.values() if other is not worker for lease in other.client.held]
        lease = next((lease for lease in theirs if lease.stage == worker.stage), lease)
        if lease in held:
            kind = "unknown lease"
    if kind == "unknown lease":
        lease = m.LeaseRef(lease.stage, lease.item, lease.lease + 1000)
    ticket_id = lease.item + (kind == "another ticket")
    samples += kind == "more samples"
    if isinstance(worker, SimActor):
        payload = m.encode_rollout(rollout(ticket_id, worker.client.name, "forged", [1 << 20], samples))
    else:
        scores = tuple(score_of("forged", index) for index in range(samples))
        payload = [m.encode(m.GroupScores(ticket_id, worker.client.name, scores))]
    return m.Complete(lease), payload[:-1] if kind == "a frame less" else payload


class DeliveryMachine(RuleBasedStateMachine):
    """Faults in any order, between moves in any order.

    Invariants: see `check_books` and `check_broker`; the simulated learner asserts that a group it accepts was
    generated for its ticket with its own weights and scored as what it is, that a position is trained once, and the
    bound of staleness. In the end `run_to_the_end` shows that nothing is stuck.
    """

    @initialize(
        groups=st.integers(1, 3),
        bound=st.integers(0, 3),
        every=st.integers(1, 3),
        queue_items=st.sampled_from([100, 2]),
        bad_frames_allowed=st.sampled_from([100, 2]),
        seconds=st.integers(0, 20),
    )
    def start(
        self, groups: int, bound: int, every: int, queue_items: int, bad_frames_allowed: int, seconds: int
    ) -> None:
        self.world = make_world(Pace(groups, bound, every), queue_items, bad_frames_allowed)
        self.world.run_fairly(seconds)

    # ------------------------------------------------------------------ what goes well

    @rule(choices=st.lists(PICK, min_size=10, max_size=60))
    def things_happen_in_any_order(self, choices: list[int]) -> None:
        for choice in choices:
            moves = self.world.moves()
            moves[choice % len(moves)]()

    @rule(seconds=st.integers(1, 4))
    def work_goes_on(self, seconds: int) -> None:
        self.world.run_fairly(seconds)

    @rule(seconds=st.integers(5, 20))
    def work_goes_on_for_long(self, seconds: int) -> None:
        self.world.run_fairly(seconds)

    @rule(seconds=st.integers(1, 15))
    def all_is_mended(self, seconds: int) -> None:
        end_faults(self.world)
        self.world.run_fairly(seconds)

    @rule(seconds=st.sampled_from([0.5, 2.0, LEASE_S / 2, LEASE_S + 1]))
    def time_passes(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    # ------------------------------------------------------------------ workers

    def worker(self, pick: int) -> SimWorker:
        """One of the workers that are alive."""
        return list(self.world.workers.values())[pick % len(self.world.workers)]

    @rule(name=st.sampled_from(sorted(NAMES)), capacity=st.integers(1, 3))
    def worker_joins_or_comes_back(self, name: str, capacity: int) -> None:
        if name not in self.world.workers:
            self.world.start_worker(NAMES[name], name, capacity)

    @precondition(lambda self: self.world.workers)
    @rule(pick=PICK, sent=SENT)
    def worker_is_killed(self, pick: int, sent: int) -> None:
        self.world.kill_worker(self.worker(pick).client.name, sent)

    @precondition(lambda self: self.world.workers)
    @rule(pick=PICK)
    def worker_begins_to_leave(self, pick: int) -> None:
        self.worker(pick).drain()

    @precondition(lambda self: self.world.workers)
    @rule(pick=PICK, which=PICK)
    def task_fails(self, pick: int, which: int) -> None:
        worker = self.worker(pick)
        if worker.running and worker.tasks:
            worker.give_up(worker.tasks[which % len(worker.tasks)])

    @precondition(lambda self: self.world.workers)
    @rule(pick=PICK, which=PICK)
    def worker_answers_again(self, pick: int, which: int) -> None:
        worker = self.worker(pick)
        if worker.running and worker.answers:
            worker.client.send(*worker.answers[-1 - which % len(worker.answers)])

    @precondition(lambda self: self.world.workers)
    @rule(pick=PICK, kind=st.sampled_from(GARBAGE))
    def worker_sends_garbage(self, pick: int, kind: str) -> None:
        worker = self.worker(pick)
        if worker.running:
            worker.client.send(*garbage(kind, worker, self.world))

    # ------------------------------------------------------------------ everybody

    @rule(pick=LEARNER_OR_ANY)
    def process_is_stopped_or_goes_on(self, pick: int) -> None:
        everybody = self.world.everybody
        if everybody:
            process = everybody[pick % len(everybody)]
            process.running = not process.running

    @rule(pick=LEARNER_OR_ANY, up=st.booleans(), down=st.booleans())
    def messages_are_late_or_flow_again(self, pick: int, up: bool, down: bool) -> None:
        everybody = self.world.everybody
        if everybody:
            link = everybody[pick % len(everybody)].client.link
            link.slow_up, link.slow_down = up, down

    @rule(pick=LEARNER_OR_ANY, lost_up=LOST, lost_down=LOST)
    def connection_breaks(self, pick: int, lost_up: int, lost_down: int) -> None:
        running = self.world.running
        if running:
            client = running[pick % len(running)].client
            self.world.wire.break_connection(client.name, lost_up, lost_down)
            client.hello()  # `BrokerClient` hears of every new connection

    @rule(lost_up=LOST, lost_down=LOST, noticed=st.booleans())
    def broker_restarts(self, lost_up: int, lost_down: int, noticed: bool) -> None:
        """`noticed`: the clients' sockets tell of it before the new broker asks who they are."""
        self.world.restart_broker(lost_up, lost_down)
        for process in self.world.running if noticed else ():
            process.client.hello()

    @precondition(lambda self: self.world.learner.alive)
    @rule(sent=SENT)
    def learner_is_killed(self, sent: int) -> None:
        self.world.kill_learner(sent)

    @precondition(lambda self: not (self.world.learner.alive and self.world.learner.running))
    @rule(older=st.integers(0, 2))
    def learner_goes_on_from_a_checkpoint(self, older: int) -> None:
        self.world.replace_learner(older)

    # ------------------------------------------------------------------ what must hold

    @invariant()
    def the_books_balance(self) -> None:
        if hasattr(self, "world"):
            check_books(self.world)
            check_broker(self.world)

    def teardown(self) -> None:
        if hasattr(self, "world") and sys.exception() is None:
            run_to_the_end(self.world)


TestDelivery = DeliveryMachine.TestCase
TestDelivery.settings = hypothesis.settings(max_examples=400, stateful_step_count=30, deadline=None)


# --------------------------------------------------------------------------- the rare ones by name


def run_until(world: World, satisfied: Callable[[], bool]) -> None:
    for _ in range(CALM_S):
        if satisfied():
            return
        world.run_fairly(1)
    raise AssertionError("it never came to this")


def test_an_undisturbed_run_trains_every_position_once() -> None:
    world = make_world(Pace(groups_per_step=2, max_staleness=1, checkpoint_every=2))
    run_until(world, lambda: world.learner.version == 6)
    lineage = world.learner.lineage
    assert lineage.aside, "some groups teach nothing"
    assert set(lineage.trained.values()) == set(range(6))
    assert world.wire.broker.rejected_frames == 0
    assert [checkpoint.version for checkpoint in world.checkpoints] == [0, 2, 4, 6]
    run_to_the_end(world)


def test_an_older_checkpoint_takes_back_what_came_after_it() -> None:
    world = make_world(Pace(groups_per_step=1, max_staleness=2, checkpoint_every=1))
    run_until(world, lambda: world.learner.version == 5)
    world.kill_learner(sent=0)
    world.replace_learner(older=3)
    learner = world.learner
    assert learner.version == 2
    assert set(learner.lineage.trained.values()) == {0, 1}
    run_until(world, lambda: learner.version == 5)
    assert sorted(learner.lineage.trained.values()) == [0, 1, 2, 3, 4]
    run_to_the_end(world)


def test_an_answer_to_the_last_learner_through_the_last_broker_is_late() -> None:
    """It arrives after the actor's new Hello, when the same ticket of the new learner is in the same actor's hands."""
    world = make_world(Pace(groups_per_step=1, max_staleness=0, checkpoint_every=1))
    for name in ("actor-1", "actor-2"):
        world.kill_worker(name, sent=0)
    actor = world.workers["actor-0"]
    run_until(world, lambda: any(task.versions for task in actor.tasks))
    (task,) = actor.tasks
    task.done_at = float("inf")  # a straggler
    world.kill_learner(sent=0)
    world.restart_broker(lost_up=0, lost_down=0)
    world.replace_learner()
    actor.client.hello()
    actor.client.link.slow_down = True
    run_until(world, lambda: world.wire.broker.stages["rollout"].leases_of("actor-0") == 1)
    actor.finish(task)
    actor.client.link.slow_down = False
    run_to_the_end(world)
    assert world.wire.broker.stages["rollout"].late > 0


def test_what_a_learner_sends_while_the_broker_has_forgotten_it_is_sent_again() -> None:
    world = make_world(Pace(groups_per_step=1, max_staleness=0, checkpoint_every=1))
    run_until(world, lambda: world.learner.in_training)
    link, version = world.learner.client.link, world.learner.version
    link.slow_up = True
    run_until(world, lambda: world.learner.version > version)
    world.run_fairly(int(LEASE_S) + 1)
    assert world.learner.client.name not in {peer.name for peer in world.wire.broker.status(world.wire.now).peers}
    run_to_the_end(world)


def test_a_learner_that_wakes_up_after_its_successor_has_started_ends() -> None:
    world = make_world(Pace(groups_per_step=1, max_staleness=1, checkpoint_every=1))
    run_until(world, lambda: world.learner.version == 2)
    first = world.learner
    first.running = False
    world.replace_learner()
    run_until(world, lambda: world.learner.version == 4)
    first.running = True
    run_until(world, lambda: not first.alive)
    assert first.version == 2
    run_to_the_end(world)
