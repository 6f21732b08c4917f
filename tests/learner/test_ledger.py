"""The ledger under Hypothesis: groups arrive in any order, late, twice, too old; the learner restarts."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from learner.ledger import LedgerState, TicketLedger

RULES = ["zero_variance", "another_rule"]


@dataclass
class Books:
    """The test's own record of what became of every position; a checkpoint holds a copy."""

    version: int = 0
    in_flight: dict[int, int] = field(default_factory=dict)  # position -> min_version
    arrived: dict[int, int] = field(default_factory=dict)  # position -> oldest version
    unissued: set[int] = field(default_factory=set)  # outstanding at the last restart, not issued since
    trained: set[int] = field(default_factory=set)
    aside: dict[str, set[int]] = field(default_factory=lambda: {rule: set() for rule in RULES})

    def copy(self) -> Books:
        aside = {rule: set(positions) for rule, positions in self.aside.items()}
        kept = (dict(self.in_flight), dict(self.arrived), set(self.unissued), set(self.trained))
        return Books(self.version, *kept, aside)

    @property
    def outstanding(self) -> set[int]:
        return self.in_flight.keys() | self.arrived.keys() | self.unissued

    @property
    def ended(self) -> set[int]:
        return self.trained.union(*self.aside.values())


def can_be_met(oldest_versions: Iterable[int], next_version: int, batch: int, bound: int) -> bool:
    """Invariant 2, as it is written there: a group's deadline is `bound` after its oldest version."""
    deadlines = [oldest + bound for oldest in oldest_versions]
    return all(
        sum(deadline <= d for deadline in deadlines) <= max(0, batch * (d - next_version + 1)) for d in deadlines
    )


class LedgerMachine(RuleBasedStateMachine):
    """Plays actors, broker and learner around the ledger, and checks its three invariants."""

    @initialize(batch=st.integers(1, 4), bound=st.integers(0, 4))
    def start(self, batch: int, bound: int) -> None:
        self.batch, self.bound = batch, bound
        self.ledger = TicketLedger(batch, bound)
        self.books = Books()
        self.in_training = False
        self.checkpoints = [(self.encoded_state(), self.books.copy())]

    def encoded_state(self) -> bytes:
        return msgspec.msgpack.encode(self.ledger.state())

    @property
    def next_version(self) -> int:
        return self.books.version + self.in_training

    # ------------------------------------------------------------------ tickets and groups

    @rule(share=st.one_of(st.just(1.0), st.floats(0, 1)))
    def issue(self, share: float) -> None:
        books = self.books
        room = self.ledger.admissible(books.version, self.next_version)
        if self.bound == 0 and self.in_training:
            assert room == 0, "synchronous: nothing is generated while a step runs"
        wanted = round(share * room)
        positions = self.ledger.issue(wanted, books.version)
        again = sorted(books.unissued)[:wanted]
        assert len(positions) == wanted
        assert positions[: len(again)] == again, "what was outstanding at a restart is issued first"
        books.unissued -= set(again)
        for position in positions:
            assert position not in books.outstanding | books.ended, "a ticket is issued once, and not after its end"
            books.in_flight[position] = books.version

    @precondition(lambda self: self.books.in_flight)
    @rule(data=st.data())
    def arrive(self, data: st.DataObject) -> None:
        """Some of the groups under way come in, each made with weights as old as its ticket or newer."""
        for position in data.draw(st.lists(st.sampled_from(sorted(self.books.in_flight)), min_size=1, unique=True)):
            min_version = self.books.in_flight.pop(position)
            oldest = data.draw(st.integers(min_version, self.books.version))
            assert self.ledger.is_expected(position)
            assert not self.ledger.arrive(position, min_version - 1), "older than its ticket allows"
            assert self.ledger.is_expected(position)
            assert self.ledger.arrive(position, oldest)
            self.books.arrived[position] = oldest

    @precondition(lambda self: self.books.arrived)
    @rule(data=st.data(), name=st.sampled_from(RULES))
    def end_with_a_group(self, data: st.DataObject, name: str) -> None:
        self.set_aside(data.draw(st.sampled_from(sorted(self.books.arrived))), name)

    @precondition(lambda self: self.books.in_flight)
    @rule(data=st.data(), name=st.sampled_from(RULES))
    def end_without_a_group(self, data: st.DataObject, name: str) -> None:
        self.set_aside(data.draw(st.sampled_from(sorted(self.books.in_flight))), name)

    def set_aside(self, position: int, name: str) -> None:
        self.ledger.set_aside(position, name)
        self.books.in_flight.pop(position, None)
        self.books.arrived.pop(position, None)
        self.books.aside[name].add(position)

    @rule(oldest=st.integers(0, 20))
    def arrive_unasked(self, oldest: int) -> None:
        """Second answers, those to tickets that have ended or were not issued: nothing changes."""
        for position in range(self.ledger.state().cursor + 2):
            if position not in self.books.in_flight:
                assert not self.ledger.is_expected(position)
                assert not self.ledger.arrive(position, oldest)

    # ------------------------------------------------------------------ steps

    @precondition(lambda self: not self.in_training)
    @rule()
    def begin_step(self) -> None:
        books = self.books
        batch = self.ledger.take_batch(books.version)
        if batch is None:
            assert self.must_wait()
            return
        assert len(batch) == len(set(batch)) == self.batch
        assert batch == sorted(batch)
        for position in batch:
            assert books.version - books.arrived.pop(position) <= self.bound, "staleness bound of every group"
        self.ledger.trained(batch)
        books.trained |= set(batch)
        self.in_training = True

    def must_wait(self) -> bool:
        """Too few groups are here, or one that is not would be too old some day if these were trained now."""
        arrived = sorted(self.books.arrived.values())
        rest = [*arrived[self.batch :], *self.books.in_flight.values()]
        next_version = self.books.version + 1
        return len(arrived) < self.batch or not can_be_met(rest, next_version, self.batch, self.bound)

    @precondition(lambda self: self.in_training)
    @rule()
    def end_step(self) -> None:
        self.books.version += 1
        self.in_training = False

    @precondition(lambda self: not self.in_training)
    @rule(data=st.data(), steps=st.integers(1, 4))
    def go_on(self, data: st.DataObject, steps: int) -> None:
        """What the learner's loop does, with some stragglers."""
        for _ in range(steps):
            self.issue(1.0)
            if self.books.in_flight:
                self.arrive(data)
            self.begin_step()
            if self.in_training:
                self.issue(1.0)
                self.end_step()

    # ------------------------------------------------------------------ restarts

    @precondition(lambda self: not self.in_training)
    @rule()
    def save(self) -> None:
        self.checkpoints.append((self.encoded_state(), self.books.copy()))

    @rule(older=st.integers(0, 2), keeps_groups=st.booleans())
    def restart(self, older: int, keeps_groups: bool) -> None:
        """The learner dies and goes on from one of its checkpoints, with or without the groups it held."""
        del self.checkpoints[max(1, len(self.checkpoints) - older) :]
        blob, saved = self.checkpoints[-1]
        self.books = saved.copy()
        self.in_training = False
        self.ledger = TicketLedger(self.batch, self.bound, msgspec.msgpack.decode(blob, type=LedgerState))
        kept = saved.arrived if keeps_groups else {}
        for position, oldest in kept.items():
            self.ledger.hold(position, oldest)
        self.books.unissued = saved.outstanding - kept.keys()
        self.books.in_flight, self.books.arrived = {}, dict(kept)

    # ------------------------------------------------------------------ what must hold

    @invariant()
    def every_position_has_one_fate(self) -> None:
        """Invariant 1."""
        if not hasattr(self, "ledger"):
            return
        books, state, audit = self.books, self.ledger.state(), self.ledger.audit()
        assert state.outstanding == sorted(books.outstanding)
        assert {name: set(ids) for name, ids in state.set_aside.items()} == {n: p for n, p in books.aside.items() if p}
        assert books.outstanding | books.ended == set(range(state.cursor))
        counts = [len(books.outstanding), len(books.trained), *map(len, books.aside.values())]
        assert sum(counts) == state.cursor == audit["issued"]
        assert [audit["outstanding"], audit["trained"]] == counts[:2]
        assert [audit.get(f"set_aside_{name}", 0) for name in RULES] == counts[2:]
        assert self.ledger.outstanding == len(books.in_flight) + len(books.arrived)
        assert self.ledger.waiting == len(books.arrived)

    @invariant()
    def every_deadline_can_be_met(self) -> None:
        """Invariant 2."""
        if hasattr(self, "ledger"):
            versions = [*self.books.in_flight.values(), *self.books.arrived.values()]
            assert can_be_met(versions, self.next_version, self.batch, self.bound)

    def teardown(self) -> None:
        """Whatever happened, the run can go on: when everything arrives, what is outstanding is soon trained."""
        if not hasattr(self, "ledger"):
            return
        if self.in_training:
            self.end_step()
        due = self.books.outstanding
        for _ in range(self.bound + 2):
            self.issue(1.0)
            for position, version in list(self.books.in_flight.items()):
                assert self.ledger.arrive(position, version)
                self.books.arrived[position] = self.books.in_flight.pop(position)
            self.begin_step()
            assert self.in_training, "no deadlock"
            self.end_step()
        assert due <= self.books.ended, "no prompt starves"


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)


@settings(max_examples=500, deadline=None)
@given(
    batch=st.integers(1, 3),
    bound=st.integers(0, 3),
    groups=st.lists(st.tuples(st.integers(0, 3), st.one_of(st.none(), st.integers(0, 3))), max_size=9),
)
def test_a_batch_is_taken_exactly_where_one_leaves_every_deadline_in_reach(
    batch: int, bound: int, groups: list[tuple[int, int | None]]
) -> None:
    """Against an oracle that tries every choice of arrived groups.

    `groups`: a ticket's age in versions, and by how many versions its group is younger; None: it is not here.
    """
    version = bound + 1
    ledger = TicketLedger(batch, bound)
    oldest: dict[int, int] = {}
    for age, younger in groups:
        min_version = version - min(age, bound)
        (position,) = ledger.issue(1, published=min_version)
        oldest[position] = min(version, min_version + (younger or 0))
        assert younger is None or ledger.arrive(position, oldest[position])
    arrived = [position for position, (_, younger) in enumerate(groups) if younger is not None]

    def leaves_all_in_reach(picked: tuple[int, ...]) -> bool:
        rest = [oldest[position] for position in oldest if position not in picked]
        return can_be_met(rest, version + 1, batch, bound)

    possible = {picked for picked in itertools.combinations(arrived, batch) if leaves_all_in_reach(picked)}
    taken = ledger.take_batch(version)
    assert (taken is not None) == bool(possible)
    if taken is not None:
        assert tuple(taken) in possible
        left = [oldest[position] for position in arrived if position not in taken]
        assert max(oldest[position] for position in taken) <= min(left, default=version), "earliest deadline first"


def test_a_straggler_at_its_deadline_is_waited_for() -> None:
    ledger = TicketLedger(groups_per_step=2, max_staleness=1)
    assert ledger.admissible(published=0, next_version=0) == 4
    ledger.issue(4, published=0)
    for position in (1, 2, 3):
        ledger.arrive(position, 0)
    batch = ledger.take_batch(0)
    assert batch == [1, 2], "at version 0 nobody is due yet: train what is there"
    ledger.trained(batch)
    assert ledger.admissible(published=0, next_version=1) == 0, "two old groups fill the next step"
    assert ledger.admissible(published=1, next_version=1) == 2
    for position in ledger.issue(2, published=1):
        ledger.arrive(position, 1)
    assert ledger.take_batch(1) is None, "ticket 0 would be too old at version 2"
    assert ledger.blocking(1) == [0]
    ledger.arrive(0, 0)
    assert ledger.take_batch(1) == [0, 3]


def test_without_staleness_a_step_begins_when_all_its_groups_are_here() -> None:
    ledger = TicketLedger(groups_per_step=2, max_staleness=0)
    assert ledger.issue(ledger.admissible(0, 0), published=0) == [0, 1]
    assert ledger.admissible(0, 0) == 0
    ledger.arrive(1, 0)
    assert ledger.take_batch(0) is None
    ledger.set_aside(1, "zero_variance")
    assert ledger.issue(ledger.admissible(0, 0), published=0) == [2], "its place is filled at the same version"
    ledger.arrive(2, 0)
    ledger.arrive(0, 0)
    assert ledger.take_batch(0) == [0, 2]
    ledger.trained([0, 2])
    assert ledger.admissible(0, 1) == 0, "nothing is generated with old weights for the next step"
    assert ledger.issue(ledger.admissible(1, 1), published=1) == [3, 4]


def test_a_group_made_with_older_weights_than_its_ticket_allows_is_refused() -> None:
    ledger = TicketLedger(1, 0)
    ledger.issue(1, published=5)
    assert not ledger.arrive(0, 4)
    assert ledger.is_expected(0)


def test_outstanding_tickets_of_a_checkpoint_are_issued_first() -> None:
    state = LedgerState(cursor=10, outstanding=[9, 4], set_aside={"zero_variance": [2]})
    ledger = TicketLedger(4, 0, state)
    assert ledger.audit() == {"issued": 10, "outstanding": 2, "trained": 7, "set_aside_zero_variance": 1}
    assert ledger.issue(3, published=7) == [4, 9, 10]


def test_groups_kept_in_a_checkpoint_are_not_generated_again_and_keep_their_age() -> None:
    ledger = TicketLedger(1, 2, LedgerState(cursor=6, outstanding=[3, 5], set_aside={}))
    ledger.hold(5, oldest_version=8)
    assert not ledger.is_expected(5)
    assert ledger.issue(2, published=9) == [3, 6]
    ledger.arrive(3, 9)
    assert ledger.take_batch(9) == [5], "the oldest first"
    with pytest.raises(ValueError, match="group 4 is kept"):
        ledger.hold(4, oldest_version=9)
    with pytest.raises(ValueError, match="group 5 is kept"):
        ledger.hold(5, oldest_version=9)


def test_a_broken_state_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode({"cursor": "ten"}), type=LedgerState)
