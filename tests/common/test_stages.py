"""The stage state machine: Hypothesis plays workers that die, come back, answer late, twice or for others."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from common.stages import Offer, Stage

WORKERS = ["a", "b", "c"]
LEASE_S = 10.0
MAX_ITEMS, MAX_BYTES = 12, 60
FIRST_LEASE = 5000
ANSWERED_BY = st.none() | st.sampled_from([*WORKERS, "stranger"])  # None: by whom it was leased to


class StageMachine(RuleBasedStateMachine):
    """A model in plain dicts beside the stage; every rule checks the answer, every invariant the sizes."""

    @initialize()
    def start(self) -> None:
        self.stage: Stage[str] = Stage("score", LEASE_S, MAX_ITEMS, MAX_BYTES, FIRST_LEASE)
        self.now = 0.0
        self.capacity: dict[str, int] = {}
        self.open: dict[int, tuple[int, int]] = {}  # item -> priority, size
        self.completed: set[int] = set()
        self.begun: set[int] = set()
        self.current: dict[int, tuple[str, int]] = {}  # item -> worker, lease
        self.expires: dict[int, float] = {}  # item -> time
        self.delayed: dict[int, float] = {}  # item -> time
        self.given: list[tuple[int, int, str]] = []  # item, lease, worker: all there ever were
        self.next_item = self.late = self.expired = 0
        for worker in WORKERS:
            self.serve(worker, 2)
        for size in range(1, 7):
            self.offer(size, size % 2, repeat=False)

    def held_by(self, worker: str) -> dict[int, int]:
        return {item: lease for item, (holder, lease) in self.current.items() if holder == worker}

    def take_back(self, item: int) -> None:
        del self.current[item], self.expires[item]

    @rule(size=st.integers(1, 20), priority=st.integers(0, 3), repeat=st.booleans())
    def offer(self, size: int, priority: int, repeat: bool) -> None:
        item = min(self.open) if repeat and self.open else self.next_item
        full = len(self.open) >= MAX_ITEMS or self.stage.bytes >= MAX_BYTES
        outcome = self.stage.offer(item, f"payload {item}", size, (priority,))
        if item in self.open:
            assert outcome is Offer.DUPLICATE
        elif full:
            assert outcome is Offer.FULL
        else:
            assert outcome is Offer.ACCEPTED
            self.open[item] = (priority, size)
            self.next_item += 1

    def place(self, item: int) -> tuple[bool, int]:
        return (item not in self.begun, self.open[item][0])

    @rule(worker=st.sampled_from(WORKERS), capacity=st.integers(0, 4))
    def serve(self, worker: str, capacity: int) -> None:
        self.capacity[worker] = capacity
        self.stage.serve(worker, capacity)

    @rule(limit=st.none() | st.integers(-1, 3))
    def grant(self, limit: int | None) -> None:
        self.delayed = {item: ready_at for item, ready_at in self.delayed.items() if ready_at > self.now}
        waiting = set(self.open) - set(self.current) - set(self.delayed)
        given = self.stage.grant(self.now, limit)
        assert limit is None or len(given) <= max(0, limit)
        for grant in given:
            assert grant.lease > max((lease for _, lease, _ in self.given), default=FIRST_LEASE - 1), "given out once"
            assert grant.item_id in waiting, "what is leased, delayed or done is not given out"
            waiting.discard(grant.item_id)
            assert all(self.place(grant.item_id) <= self.place(other) for other in waiting)
            self.begun.add(grant.item_id)
            assert grant.payload == f"payload {grant.item_id}"
            self.given.append((grant.item_id, grant.lease, grant.worker))
            self.current[grant.item_id] = (grant.worker, grant.lease)
            self.expires[grant.item_id] = self.now + LEASE_S
            assert len(self.held_by(grant.worker)) <= self.capacity[grant.worker]
        if limit is None:
            idle = [worker for worker, most in self.capacity.items() if len(self.held_by(worker)) < most]
            assert not waiting or not idle, "work waits only where nobody is free"

    def answer(self, pick: int, outdated: bool, other: str | None) -> tuple[int, int, str, bool]:
        """Item, lease and worker of an answer to any lease there ever was, or to one of now; and whether it counts."""
        now = [(item, lease, worker) for item, (worker, lease) in self.current.items()]
        leases = self.given if outdated or not now else now
        item, lease, worker = leases[pick % len(leases)]
        worker = other or worker
        valid = self.current.get(item) == (worker, lease)
        self.late += not valid
        return item, lease, worker, valid

    @precondition(lambda self: self.given)
    @rule(pick=st.integers(0, 99), outdated=st.booleans(), other=ANSWERED_BY)
    def complete_perhaps_late_twice_or_for_another(self, pick: int, outdated: bool, other: str | None) -> None:
        item, lease, worker, valid = self.answer(pick, outdated, other)
        done = self.stage.complete(item, lease, worker)
        assert (done is not None) == valid
        if done is not None:
            assert done.item_id == item
            assert item not in self.completed, "an item is completed at most once"
            self.completed.add(item)
            del self.open[item]
            self.take_back(item)

    @precondition(lambda self: self.given)
    @rule(pick=st.integers(0, 99), outdated=st.booleans(), other=ANSWERED_BY, delay=st.floats(0, 5))
    def release_perhaps_late_twice_or_for_another(
        self, pick: int, outdated: bool, other: str | None, delay: float
    ) -> None:
        item, lease, worker, valid = self.answer(pick, outdated, other)
        assert self.stage.release(item, lease, worker, self.now + delay) == valid
        if valid:
            self.take_back(item)
            self.delayed[item] = self.now + delay

    @rule(worker=st.sampled_from(WORKERS))
    def leave(self, worker: str) -> None:
        mine = self.held_by(worker)
        assert set(self.stage.leave(worker)) == set(mine)
        self.capacity.pop(worker, None)
        for item in mine:
            self.take_back(item)

    @rule(worker=st.sampled_from(WORKERS), forgets=st.sets(st.integers(0, 3)), unseen=st.integers(0, 3))
    def heartbeat(self, worker: str, forgets: set[int], unseen: int) -> None:
        """The worker names its leases but some, has not seen its newest ones yet, and names others' as well."""
        mine = self.held_by(worker)
        named = {item for number, item in enumerate(sorted(mine)) if number not in forgets}
        seen = sorted(mine.values())[: max(0, len(mine) - unseen)]
        newest_seen = seen[-1] if seen else 0
        lost = {item for item, lease in mine.items() if item not in named and lease <= newest_seen}
        held = [lease for item, (holder, lease) in self.current.items() if holder != worker or item in named]
        assert set(self.stage.renew(worker, held, newest_seen, self.now)) == lost
        for item in named:
            self.expires[item] = self.now + LEASE_S
        for item in lost:
            self.take_back(item)

    @rule(seconds=st.floats(0, 7))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        due = {item for item in self.current if self.expires[item] <= self.now}
        assert set(self.stage.expire(self.now)) == due
        self.expired += len(due)
        for item in due:
            self.take_back(item)

    @rule()
    def clear(self) -> None:
        self.stage.clear()
        for model in (self.open, self.current, self.expires, self.delayed):
            model.clear()

    @invariant()
    def nothing_is_lost_or_counted_twice(self) -> None:
        if not hasattr(self, "stage"):
            return
        assert len(self.stage) == len(self.open)
        assert all(self.stage.payload_of(item) == f"payload {item}" for item in self.open)
        assert not any(item in self.stage for item in self.completed)
        assert self.stage.leased == len(self.current)
        assert self.stage.queued == len(self.open) - len(self.current)
        assert self.stage.bytes == sum(size for _, size in self.open.values())
        assert (self.stage.late, self.stage.expired) == (self.late, self.expired)
        assert all(self.stage.leases_of(worker) == len(self.held_by(worker)) for worker in WORKERS)

    @invariant()
    def room_is_what_may_be_offered(self) -> None:
        if not hasattr(self, "stage"):
            return
        full = len(self.open) >= MAX_ITEMS or self.stage.bytes >= MAX_BYTES
        assert (self.stage.room == 0) == full
        assert self.stage.room <= max(0, MAX_ITEMS - len(self.open))

    @invariant()
    def the_next_event_is_named(self) -> None:
        if not hasattr(self, "stage"):
            return
        times = [*self.expires.values(), *self.delayed.values()]
        assert self.stage.next_event() == min(times, default=None)

    def teardown(self) -> None:
        """Whatever happened, a willing worker can finish everything that was accepted."""
        if not hasattr(self, "stage"):
            return
        for worker in WORKERS:
            self.stage.leave(worker)
        self.stage.serve("last", len(self.open))
        grants = self.stage.grant(self.now + 1e6)
        finished = {g.item_id for g in grants if self.stage.complete(g.item_id, g.lease, g.worker)}
        assert finished == set(self.open)
        assert self.stage.bytes == 0


TestStage = StageMachine.TestCase
TestStage.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)


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
    stage.offer(10, None, 1, priority=(-1,))
    stage.leave("c")
    stage.serve("d", 1)
    assert [g.item_id for g in stage.grant(2.0)] == [0], "given out before, whatever has come since"


def test_next_event_names_the_earliest_wake_up() -> None:
    stage: Stage[None] = Stage("score", LEASE_S, 100, 1000)
    assert stage.next_event() is None
    stage.offer(1, None, 1)
    stage.offer(2, None, 1)
    stage.serve("a", 2)
    one, two = stage.grant(0.0)
    stage.release(two.item_id, two.lease, "a", ready_at=3.0)
    assert stage.next_event() == 3.0
    assert stage.grant(2.9) == []
    assert [g.item_id for g in stage.grant(3.0)] == [2]
    assert stage.renew("a", [one.lease], newest_seen=two.lease, now=5.0) == [], "the third lease is on its way"
    assert stage.renew("a", [one.lease], newest_seen=3, now=5.0) == [2], "a lease its worker lost is taken back"
    assert stage.expire(14.9) == []
    assert stage.expire(15.0) == [1]


def test_room_counts_the_bytes_left_in_items_of_recent_size() -> None:
    stage: Stage[None] = Stage("train", LEASE_S, max_items=100, max_bytes=100)
    assert stage.room == 100
    stage.offer(0, None, 10)
    assert stage.room == 9
    for item in range(1, 9):
        stage.offer(item, None, 10)
    assert stage.room == 1
    assert stage.offer(9, None, 1000) is Offer.ACCEPTED, "one more, however large: else a large item waits for ever"
    assert stage.room == 0
    assert stage.offer(10, None, 1) is Offer.FULL


def test_room_is_promised_to_results_with_an_eighth_to_spare() -> None:
    stage: Stage[None] = Stage("train", LEASE_S, max_items=30, max_bytes=160)
    assert stage.room_for_results(promised=28) == 2, "of a size nobody knows yet"
    stage.offer(0, None, 10)
    assert stage.room_for_results(promised=0) == 13
    assert stage.room_for_results(promised=13) == stage.room_for_results(promised=40) == 0
    stage.offer(1, None, 125)
    assert stage.room == 1
    assert stage.room_for_results(promised=0) == 1, "one at a time, as long as anything is free"
    stage.offer(2, None, 5)
    assert (stage.room, stage.room_for_results(promised=0)) == (1, 0)
