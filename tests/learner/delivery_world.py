"""The simulated learner and everybody together; see `tests.learner.delivery_simulation`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import msgspec

from common import messages as m
from common.broker.service import BrokerService, BrokerSettings
from learner.ledger import LedgerState, TicketLedger
from tests.learner.delivery_simulation import (
    SAMPLES,
    Assignment,
    Move,
    SimClient,
    SimWorker,
    Wire,
    score_of,
)

RESUBMIT_S = 1.0
STEP_S = 2.0
START_TIMEOUT_S = 30.0  # a process that is not welcomed by then ends, and its supervisor starts it again
ZERO_VARIANCE = "zero_variance"


@dataclass
class Lineage:
    """What became of the positions in the history of the weights that survive."""

    trained: dict[int, int] = field(default_factory=dict)  # position -> version trained at
    aside: set[int] = field(default_factory=set)

    def copy(self) -> Lineage:
        return Lineage(dict(self.trained), set(self.aside))


@dataclass(frozen=True)
class Checkpoint:
    """What a learner goes on from; `lineage` is the test's own record."""

    version: int
    ledger: bytes
    groups: dict[int, m.ScoredGroup]
    lineage: Lineage


@dataclass(frozen=True)
class Pace:
    """How the learner of a run is set."""

    groups_per_step: int
    max_staleness: int
    checkpoint_every: int


class SimLearner:
    """`LearnerLoop` (issue, receive, take a batch, train, announce) on top of `LearnerConnection`."""

    def __init__(self, wire: Wire, incarnation: int, pace: Pace, checkpoints: list[Checkpoint]) -> None:
        start = checkpoints[-1]
        self.alive = True
        self.running = True
        self.incarnation = incarnation
        self.pace = pace
        self.version = start.version
        self.lineage = start.lineage.copy()
        state = msgspec.msgpack.decode(start.ledger, type=LedgerState)
        self.ledger = TicketLedger(pace.groups_per_step, pace.max_staleness, state)
        self.groups = dict(start.groups)
        for position, group in start.groups.items():
            self.ledger.hold(position, group.rollout.header.oldest_version)
        self.in_training = False
        self.trained_at = 0.0  # when the step under way is done
        self.started = False
        self.checkpoints = checkpoints
        self._open: dict[int, m.Ticket] = {}  # of the connection: submitted and not answered
        self._inbox: list[m.ScoredGroup] = []  # from the connection to the loop
        self._refused: list[tuple[float, tuple[int, ...]]] = []  # when to submit again, what
        self.client = SimClient(wire, f"learner-{incarnation}", "learner", incarnation)

    # ------------------------------------------------------------------ the connection

    def receive(self) -> None:
        """Take the next message of the broker."""
        received = self.client.receive()
        match received:
            case Assignment():
                self._group_came(received)
            case m.Welcome() if not self.started:
                self.started = True
                self.client.serve("train", 1 << 16)
            case m.Welcome() if self.client.announced is not None:
                self.client.send(m.Announce(self.client.announced))
                self._offer(list(self._open.values()))
            case m.Refused(tickets):
                self._refused.append((self.client.wire.now + RESUBMIT_S, tickets))
            case m.Superseded():
                self.alive = False

    def _group_came(self, assignment: Assignment) -> None:
        if assignment.lease not in self.client.held:
            return
        try:
            group = m.decode_scored_group(assignment.payload)
        except m.MessageError:
            self.client.release(assignment, RESUBMIT_S)
            return
        if self._open.pop(group.ticket.ticket_id, None) is not None:
            self._inbox.append(group)
        self.client.complete(assignment)

    def submit(self, tickets: list[m.Ticket]) -> None:
        self._open.update({ticket.ticket_id: ticket for ticket in tickets})
        self._offer(tickets)

    def submit_refused(self) -> None:
        """The tickets a full broker refused are offered again."""
        _, refused = self._refused.pop(0)
        self._offer([self._open[ticket_id] for ticket_id in refused if ticket_id in self._open])

    def _offer(self, tickets: list[m.Ticket]) -> None:
        if tickets:
            message = m.Submit(tuple(ticket.ticket_id for ticket in tickets))
            self.client.send(message, [m.encode(ticket) for ticket in tickets])

    # ------------------------------------------------------------------ the loop

    def moves(self) -> Iterator[Move]:
        """What it can do next by itself."""
        if not self.started:
            return
        if self._refused and self._refused[0][0] <= self.client.wire.now:
            yield self.submit_refused
        if self.client.announced is None:
            yield self._announce
        elif not self.in_training:
            yield self.turn
        elif self.client.wire.now >= self.trained_at:
            yield self.end_step

    def turn(self) -> None:
        """Once around the wait for a batch; begins to train if there is one."""
        self._issue(self.version)
        batch = self.ledger.take_batch(self.version)
        if batch is None:
            inbox, self._inbox = self._inbox, []
            for group in inbox:
                self._take(group)
            return
        self.ledger.trained(batch)
        assert len(batch) == self.pace.groups_per_step
        for position in batch:
            self._train(position, self.groups.pop(position))
        self.in_training = True
        self.trained_at = self.client.wire.now + STEP_S
        self._issue(self.version + 1)

    def end_step(self) -> None:
        self.in_training = False
        self.version += 1
        self._announce()
        if self.version % self.pace.checkpoint_every == 0:
            state = msgspec.msgpack.encode(self.ledger.state())
            self.checkpoints.append(Checkpoint(self.version, state, dict(self.groups), self.lineage.copy()))

    def _announce(self) -> None:
        self.client.announced = m.RunState(self.incarnation, self.version, "tcp://weights")
        self.client.send(m.Announce(self.client.announced))

    def _issue(self, next_version: int) -> None:
        room = self.ledger.admissible(self.version, next_version)
        positions = self.ledger.issue(room, self.version)
        assert not self.groups.keys() & positions, "a group that is here is not asked for again"
        tickets = [self._ticket(position) for position in positions]
        self.submit(tickets)

    def _ticket(self, position: int) -> m.Ticket:
        return m.Ticket(
            ticket_id=position,
            kind="train",
            prompt_id=f"q{position % 5}",
            epoch=position // 5,
            messages=(m.ChatMessage("user", f"request {position % 5}"),),
            reference={"incarnation": self.incarnation},
            sampling=m.Sampling(SAMPLES, 1.0, 1.0, 8),
            min_version=self.version,
        )

    def _take(self, group: m.ScoredGroup) -> None:
        position = group.ticket.ticket_id
        if not self.ledger.is_expected(position):
            return
        if not self.ledger.arrive(position, group.rollout.header.oldest_version):
            self.submit([group.ticket])
            return
        check_group(group, position, self.incarnation)
        if len({score.reward for score in group.scores.scores}) == 1:
            self.ledger.set_aside(position, ZERO_VARIANCE)
            assert position not in self.lineage.trained
            assert position not in self.lineage.aside
            self.lineage.aside.add(position)
        else:
            self.groups[position] = group

    def _train(self, position: int, group: m.ScoredGroup) -> None:
        assert group.ticket.ticket_id == position
        oldest = group.rollout.header.oldest_version
        assert 0 <= self.version - oldest <= self.pace.max_staleness, "staleness bound of every sample"
        assert position not in self.lineage.trained, "a prompt is trained on once"
        assert position not in self.lineage.aside
        self.lineage.trained[position] = self.version


def check_group(group: m.ScoredGroup, position: int, incarnation: int) -> None:
    """The group was generated for this ticket with weights of this learner, and scored as what it is."""
    header = group.rollout.header
    assert group.ticket.reference == {"incarnation": incarnation}
    assert group.ticket.prompt_id == f"q{position % 5}"
    assert len(header.samples) == SAMPLES
    for index, (sample, score) in enumerate(zip(header.samples, group.scores.scores, strict=True)):
        assert sample.text == f"{incarnation}/{position}/{sample.spans[0].version}"
        assert score == score_of(sample.text, index)


class World:
    """A broker, a learner, actors and rewarders, and every move that somebody can make now."""

    def __init__(self, pace: Pace, settings: BrokerSettings) -> None:
        self.pace = pace
        self.settings = settings
        self.wire = Wire(BrokerService(settings, 0.0))
        self.workers: dict[str, SimWorker] = {}
        self.killed: list[SimWorker] = []  # and not back yet
        self.old_learners: list[SimLearner] = []  # stopped when their successor was started
        self.checkpoints = [Checkpoint(0, msgspec.msgpack.encode(LedgerState(0, [], {})), {}, Lineage())]
        self.learner = SimLearner(self.wire, 1, pace, self.checkpoints)

    # ------------------------------------------------------------------ who comes and goes

    def replace_learner(self, older: int = 0) -> None:
        """A new learner goes on from the newest checkpoint, or from one that many before it; the old one, where it
        is alive, has only been taken for dead."""
        if self.learner.alive:
            self.learner.checkpoints = []  # what it writes from now on is in nobody's history
            self.old_learners.append(self.learner)
        del self.checkpoints[max(1, len(self.checkpoints) - older) :]
        self.learner = SimLearner(self.wire, self.learner.incarnation + 1, self.pace, self.checkpoints)

    def kill_learner(self, sent: int) -> None:
        """The learner dies; `sent` of its last messages are on their way nevertheless."""
        self.learner.alive = False
        self.wire.hang_up(self.learner.client.name, sent)

    def start_worker(self, kind: type[SimWorker], name: str, capacity: int) -> None:
        """A worker starts, or comes back under its old name."""
        self.workers[name] = kind(self.wire, name, capacity)

    def kill_worker(self, name: str, sent: int) -> None:
        """A worker dies; `sent` of its last messages are on their way nevertheless."""
        worker = self.workers.pop(name)
        worker.alive = False
        self.killed.append(worker)
        self.wire.hang_up(name, sent)

    def restart_the_dead(self) -> None:
        """What a supervisor does: learner and workers that were killed come back."""
        if not self.learner.alive:
            self.replace_learner()
        for worker in self.killed:
            if worker.client.name not in self.workers:
                self.start_worker(type(worker), worker.client.name, worker.capacity)
        self.killed.clear()

    def restart_broker(self, lost_up: int, lost_down: int) -> None:
        """An empty broker of a later epoch takes the place of the old one; see `Wire.replace_broker`."""
        self.settings = replace(self.settings, epoch=self.settings.epoch + 1)
        self.wire.replace_broker(BrokerService(self.settings, self.wire.now), lost_up, lost_down)

    # ------------------------------------------------------------------ what happens next

    @property
    def everybody(self) -> list[SimLearner | SimWorker]:
        """All that are alive, the stopped ones too."""
        learners = [learner for learner in (self.learner, *self.old_learners) if learner.alive]
        return [*learners, *self.workers.values()]

    @property
    def running(self) -> list[SimLearner | SimWorker]:
        """All that are alive and not stopped."""
        return [process for process in self.everybody if process.running]

    def moves(self) -> list[Move]:
        """Everything that may happen next."""
        moves: list[Move] = [self.wire.tick]
        moves += [partial(self.wire.deliver, name) for name, link in self.wire.links.items() if link.may_go_up]
        moves += [process.receive for process in self.running if process.client.link.may_come_down]
        return moves + [move for process in self.running for move in process.moves()]

    def pass_time(self, seconds: float) -> None:
        """The clock advances; whoever runs sends a heartbeat."""
        self.wire.now += seconds
        self.wire.tick()
        for process in self.running:
            process.client.heartbeat()
        self._supervise()

    def run_fairly(self, seconds: int) -> None:
        """For so long everybody gets their turns: messages arrive, work is done."""
        for _ in range(seconds):
            self.pass_time(1.0)
            for _ in range(4):
                self._deliver_all()
                for process in self.running:
                    for _ in range(2 if isinstance(process, SimLearner) else 8):
                        if (move := next(iter(process.moves()), None)) is not None:
                            move()
            self._bury()

    def _deliver_all(self) -> None:
        for name, link in self.wire.links.items():
            while link.may_go_up:
                self.wire.deliver(name)
        self.wire.tick()
        for process in self.running:
            while process.client.link.may_come_down:
                process.receive()

    def _supervise(self) -> None:
        """What was not welcomed in time has ended and is started again."""
        for process in self.running:
            client = process.client
            if client.epoch is not None or self.wire.now - client.said_hello_at <= START_TIMEOUT_S:
                continue
            if isinstance(process, SimWorker):
                self.start_worker(type(process), client.name, process.capacity)
            elif process is self.learner:
                self.kill_learner(0)
                self.replace_learner()
            else:
                process.alive = False

    def _bury(self) -> None:
        """Who leaves and has done its work says goodbye and ends."""
        for name, worker in list(self.workers.items()):
            if worker.running and worker.leaving and not worker.tasks:
                worker.say_bye()
                del self.workers[name]
                self.wire.hang_up(name, sent=len(worker.client.link.up))
