"""The ledger under Hypothesis: groups arrive in any order, late, twice; the learner restarts."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from learner.ledger import LedgerState, TicketLedger


class LedgerMachine(RuleBasedStateMachine):
    """Plays actors, broker and learner around the ledger; asserts exactly once and bounded staleness."""

    @initialize(batch=st.integers(1, 4), bound=st.integers(0, 4))
    def start(self, batch: int, bound: int) -> None:
        self.batch, self.bound = batch, bound
        self.version = 0
        self.ledger = TicketLedger(batch, bound)
        self.in_flight: dict[int, int] = {}  # position -> min_version
        self.arrived: dict[int, int] = {}  # position -> oldest version
        self.trained: list[int] = []
        self.aside: list[int] = []
        self.in_training: list[int] | None = None
        self.checkpoint: tuple[bytes, int, list[int], list[int]] = (self.encoded(), 0, [], [])

    def encoded(self) -> bytes:
        return msgspec.msgpack.encode(self.ledger.state())

    @rule(share=st.floats(0, 1))
    def issue(self, share: float) -> None:
        next_version = self.version + (self.in_training is not None)
        room = self.ledger.admissible(self.version, next_version)
        if self.bound == 0 and self.in_training is not None:
            assert room == 0, "synchronous: nothing is generated while a step runs"
        positions = self.ledger.issue(round(share * room), self.version)
        for position in positions:
            assert position not in self.in_flight
            assert position not in self.arrived
            assert position not in self.trained + self.aside, "a ticket that ended is not issued again"
            self.in_flight[position] = self.version

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def arrive(self, data: st.DataObject) -> None:
        position = data.draw(st.sampled_from(sorted(self.in_flight)))
        oldest = data.draw(st.integers(self.in_flight[position], self.version))
        assert self.ledger.is_expected(position)
        assert self.ledger.arrive(position, oldest)
        assert not self.ledger.arrive(position, oldest), "the second answer is discarded"
        del self.in_flight[position]
        if data.draw(st.integers(0, 3)) == 0:
            self.ledger.set_aside(position, "zero_variance")
            self.aside.append(position)
        else:
            self.arrived[position] = oldest

    @precondition(lambda self: self.in_training is None)
    @rule()
    def begin_step(self) -> None:
        batch = self.ledger.take_batch(self.version)
        if batch is None:
            overdue = [v for v in self.in_flight.values() if v + self.bound <= self.version]
            assert len(self.arrived) < self.batch or overdue or self.bound > 0
            return
        assert len(batch) == self.batch
        for position in batch:
            assert self.version - self.arrived.pop(position) <= self.bound, "staleness bound of every group"
        self.ledger.trained(batch)
        self.trained.extend(batch)
        self.in_training = batch

    @precondition(lambda self: self.in_training is not None)
    @rule(save=st.booleans())
    def end_step(self, save: bool) -> None:
        self.version += 1
        self.in_training = None
        if save:
            self.checkpoint = (self.encoded(), self.version, list(self.trained), list(self.aside))

    @rule()
    def restart_from_checkpoint(self) -> None:
        blob, self.version, trained, aside = self.checkpoint
        self.trained, self.aside = list(trained), list(aside)
        self.ledger = TicketLedger(self.batch, self.bound, msgspec.msgpack.decode(blob, type=LedgerState))
        self.in_flight, self.arrived, self.in_training = {}, {}, None

    @invariant()
    def every_position_has_one_fate(self) -> None:
        if not hasattr(self, "ledger"):
            return
        audit = self.ledger.audit()
        assert audit["trained"] == len(self.trained) == len(set(self.trained))
        assert audit.get("set_aside_zero_variance", 0) == len(self.aside)
        assert audit["issued"] == audit["trained"] + len(self.aside) + audit["outstanding"]

    def teardown(self) -> None:
        """Whatever happened, the run can go on: let everything arrive and train three more steps."""
        if not hasattr(self, "ledger"):
            return
        if self.in_training is not None:
            self.end_step(False)
        for _ in range(3):
            self.issue(1.0)
            for position, version in list(self.in_flight.items()):
                assert self.ledger.arrive(position, version)
                self.arrived[position] = self.in_flight.pop(position)
            self.begin_step()
            assert self.in_training is not None, "no deadlock"
            self.end_step(False)


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)


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


def test_a_broken_state_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode({"cursor": "ten"}), type=LedgerState)
