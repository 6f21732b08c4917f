"""The stage state machine: Hypothesis plays workers that die, come back, answer late and answer twice."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from common.stages import Grant, Offer, Stage

WORKERS = ["a", "b", "c"]
LEASE_S = 10.0
MAX_ITEMS, MAX_BYTES = 12, 60


class StageMachine(RuleBasedStateMachine):
    grants = Bundle("grants")

    @initialize()
    def start(self) -> None:
        self.stage: Stage[str] = Stage("score", LEASE_S, MAX_ITEMS, MAX_BYTES)
        self.now = 0.0
        self.capacity = dict.fromkeys(WORKERS, 0)
        self.open: set[int] = set()
        self.completed: list[int] = []
        self.current: dict[int, tuple[str, int]] = {}  # item -> worker, lease
        self.expires: dict[int, float] = {}
        self.seen_leases: set[int] = set()
        self.next_item = 0

    @rule(size=st.integers(1, 20), repeat=st.booleans())
    def offer(self, size: int, repeat: bool) -> None:
        item = min(self.open) if repeat and self.open else self.next_item
        outcome = self.stage.offer(item, f"payload {item}", size)
        if item in self.open:
            assert outcome is Offer.DUPLICATE
        elif outcome is Offer.ACCEPTED:
            self.open.add(item)
            self.next_item += 1
        else:
            assert len(self.open) >= MAX_ITEMS or self.stage.bytes >= MAX_BYTES

    @rule(worker=st.sampled_from(WORKERS), capacity=st.integers(0, 4))
    def serve(self, worker: str, capacity: int) -> None:
        self.capacity[worker] = capacity
        self.stage.serve(worker, capacity)

    @rule(target=grants)
    def grant(self) -> tuple[Grant[str], ...]:
        given = self.stage.grant(self.now)
        for grant in given:
            assert grant.lease not in self.seen_leases, "a lease number is given out once"
            assert grant.item_id not in self.current, "an item is leased to one worker"
            assert grant.payload == f"payload {grant.item_id}"
            self.seen_leases.add(grant.lease)
            self.current[grant.item_id] = (grant.worker, grant.lease)
            self.expires[grant.item_id] = self.now + LEASE_S
        held = {w: sum(1 for worker, _ in self.current.values() if worker == w) for w in WORKERS}
        for grant in given:
            assert held[grant.worker] <= self.capacity[grant.worker]
        return tuple(given)

    @rule(given=grants, pick=st.integers(0, 20))
    def complete_perhaps_late_or_twice(self, given: tuple[Grant[str], ...], pick: int) -> None:
        if not given:
            return
        grant = given[pick % len(given)]
        valid = self.current.get(grant.item_id) == (grant.worker, grant.lease)
        item = self.stage.complete(grant.item_id, grant.lease)
        assert (item is not None) == valid
        if valid:
            assert grant.item_id not in self.completed, "an item is completed at most once"
            self.completed.append(grant.item_id)
            self.open.discard(grant.item_id)
            del self.current[grant.item_id]

    @rule(given=consumes(grants), pick=st.integers(0, 20), delay=st.floats(0, 5))
    def release(self, given: tuple[Grant[str], ...], pick: int, delay: float) -> None:
        if not given:
            return
        grant = given[pick % len(given)]
        valid = self.current.get(grant.item_id) == (grant.worker, grant.lease)
        assert self.stage.release(grant.item_id, grant.lease, self.now + delay) == valid
        if valid:
            del self.current[grant.item_id]

    @rule(worker=st.sampled_from(WORKERS))
    def leave(self, worker: str) -> None:
        mine = {item for item, (holder, _) in self.current.items() if holder == worker}
        assert set(self.stage.leave(worker)) == mine
        self.capacity[worker] = 0
        for item in mine:
            del self.current[item]

    @rule(worker=st.sampled_from(WORKERS), forget=st.booleans())
    def heartbeat(self, worker: str, forget: bool) -> None:
        mine = {item: lease for item, (holder, lease) in self.current.items() if holder == worker}
        said = set() if forget else set(mine.values())
        back = self.stage.renew(worker, said, max(self.seen_leases, default=0), self.now)
        assert set(back) == (set(mine) if forget else set())
        for item in mine:
            if forget:
                del self.current[item]
            else:
                self.expires[item] = self.now + LEASE_S

    @rule(seconds=st.floats(0, 15))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        due = {item for item in self.current if self.expires[item] <= self.now}
        assert set(self.stage.expire(self.now)) == due
        for item in due:
            del self.current[item]

    @invariant()
    def nothing_is_lost_or_counted_twice(self) -> None:
        if not hasattr(self, "stage"):
            return
        assert len(self.stage) == len(self.open)
        assert all(item in self.stage for item in self.open)
        assert self.stage.leased == len(self.current)
        assert self.stage.queued == len(self.open) - len(self.current)
        assert len(self.stage) <= MAX_ITEMS

    def teardown(self) -> None:
        """Whatever happened, a willing worker can finish everything that was accepted."""
        if not hasattr(self, "stage"):
            return
        for worker in WORKERS:
            self.stage.leave(worker)
        self.stage.serve("last", MAX_ITEMS)
        finished = {g.item_id for g in self.stage.grant(self.now + 1e6) if self.stage.complete(g.item_id, g.lease)}
        assert finished == self.open
        assert self.stage.bytes == 0


TestStage = StageMachine.TestCase
TestStage.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_redelivered_work_goes_first_and_workers_take_turns() -> None:
    stage: Stage[None] = Stage("rollout", LEASE_S, 100, 1000)
    for item in range(4):
        stage.offer(item, None, 1, priority=(item,))
    stage.serve("a", 2)
    stage.serve("b", 2)
    first = stage.grant(0.0)
    assert [(g.worker, g.item_id) for g in first] == [("a", 0), ("b", 1), ("a", 2), ("b", 3)]
    stage.offer(9, None, 1, priority=(9,))
    stage.leave("a")
    stage.serve("c", 3)
    assert [g.item_id for g in stage.grant(1.0)] == [0, 2, 9]


def test_next_event_names_the_earliest_wake_up() -> None:
    stage: Stage[None] = Stage("score", LEASE_S, 100, 1000)
    assert stage.next_event() is None
    stage.offer(1, None, 1)
    stage.offer(2, None, 1)
    stage.serve("a", 2)
    one, two = stage.grant(0.0)
    stage.release(two.item_id, two.lease, ready_at=3.0)
    assert stage.next_event() == 3.0
    assert stage.grant(2.9) == []
    assert [g.item_id for g in stage.grant(3.0)] == [2]
    assert stage.renew("a", [one.lease], newest_seen=two.lease, now=5.0) == [], "the third lease is on its way"
    assert stage.renew("a", [one.lease], newest_seen=3, now=5.0) == [2], "a lease its worker lost is taken back"
    assert stage.expire(14.9) == []
    assert stage.expire(15.0) == [1]
