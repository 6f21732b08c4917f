"""The whole delivery without sockets: a real `BrokerService` and a real `TicketLedger` among simulated processes.

Each simulated process does message by message what its original does; what runs at the same time there is cut into
*moves* here, and a test may make them in any order. The wire keeps the order of messages per peer and direction,
delivers as late as the test likes, and loses what ZeroMQ loses: when a process dies, what it had not sent; when the
broker dies, what had reached it and what it had not sent.

* `Wire` stands for the ROUTER and DEALER sockets around `BrokerService`,
* `SimClient` for `common.transport.client.BrokerClient`,
* `SimActor` for `actors.loop.Actor`, `SimRewarder` for `rewarders.loop.Rewarder`.

The learner is in `tests.learner.delivery_world`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from common import messages as m
from common.broker.service import BrokerService, Outgoing
from common.scores import Scored

HEARTBEAT_S = 1.0
OUTAGE_S = 2.0
LOAD_S = 0.5
SAMPLES = 2
TOKENS = 4  # of each sample

Move = Callable[[], None]
UNREADABLE = None  # stands for a frame that cannot be decoded


# --------------------------------------------------------------------------- the wire


@dataclass
class Link:
    """One peer's connection: messages on their way, the next one first. `slow` directions deliver nothing now."""

    role: m.Role
    up: deque[tuple[m.ToBroker | None, m.Payload]] = field(default_factory=deque)
    down: deque[tuple[m.FromBroker, m.Payload]] = field(default_factory=deque)
    open: bool = True
    slow_up: bool = False
    slow_down: bool = False

    @property
    def may_go_up(self) -> bool:
        return bool(self.up) and not self.slow_up

    @property
    def may_come_down(self) -> bool:
        return bool(self.down) and not self.slow_down


class Wire:
    """All connections to the broker, and the time in seconds."""

    def __init__(self, broker: BrokerService) -> None:
        self.broker = broker
        self.now = 0.0
        self.links: dict[str, Link] = {}
        self.given_out: set[tuple[m.StageName, int]] = set()  # lease numbers of all brokers

    def connect(self, name: str, role: m.Role) -> Link:
        """A process connects; an earlier connection under its name ends (ROUTER_HANDOVER)."""
        self.links[name] = Link(role)
        return self.links[name]

    def hang_up(self, name: str, sent: int) -> None:
        """The process behind a connection has died; `sent` of its last messages are on their way nevertheless."""
        link = self.links[name]
        link.open = False
        link.down.clear()
        while len(link.up) > sent:
            link.up.pop()

    def break_connection(self, name: str, lost_up: int, lost_down: int) -> None:
        """A connection is reset and made again; so many messages were between the two hosts."""
        link = self.links[name]
        for _ in range(min(lost_up, len(link.up))):
            link.up.popleft()
        for _ in range(min(lost_down, len(link.down))):
            link.down.pop()

    def deliver(self, name: str) -> None:
        """The broker takes the next message of a peer."""
        link = self.links[name]
        message, payload = link.up.popleft()
        if self.broker.banned(name, link.role, self.now):
            return
        if message is UNREADABLE:
            self._send(self.broker.bad_frame(name, link.role, "not a valid message", self.now))
        else:
            self._send(self.broker.handle(name, link.role, message, payload, self.now))

    def tick(self) -> None:
        """The broker does what is due."""
        self._send(self.broker.tick(self.now))

    def _send(self, outgoing: list[Outgoing]) -> None:
        for peer, message, payload in outgoing:
            if isinstance(message, m.Assign):
                number = (message.lease.stage, message.lease.lease)
                assert number not in self.given_out, "a lease number is given out once, whatever broker gives it"
                self.given_out.add(number)
            link = self.links.get(peer)
            if link is not None and link.open:
                link.down.append((message, payload))
            else:
                self.broker.unreachable(peer)

    def replace_broker(self, broker: BrokerService, lost_up: int, lost_down: int) -> None:
        """The broker dies and an empty one takes its port; per peer the oldest `lost_up` messages had reached it,
        and the newest `lost_down` had not left it."""
        self.broker = broker
        for name, link in self.links.items():
            self.break_connection(name, lost_up if link.open else len(link.up), lost_down)


@dataclass(frozen=True)
class Assignment:
    lease: m.LeaseRef
    payload: m.Payload


class SimClient:
    """The client side of the broker's protocol."""

    def __init__(self, wire: Wire, name: str, role: m.Role, incarnation: int = 0) -> None:
        self.name = name
        self.role: m.Role = role
        self.epoch: int | None = None
        self.state: m.RunState | None = None
        self.announced: m.RunState | None = None
        self.held: dict[m.LeaseRef, None] = {}
        self.capacity: dict[m.StageName, int] = {}
        self.wire = wire
        self.link = wire.connect(name, role)
        self._incarnation = incarnation
        self._newest_seen: dict[m.StageName, int] = {}
        self.hello()

    def send(self, message: m.ToBroker | None, payload: m.Payload = ()) -> None:
        self.link.up.append((message, payload))

    def hello(self) -> None:
        self.said_hello_at = self.wire.now
        self.send(m.Hello(self.role, self._incarnation))
        for stage, capacity in self.capacity.items():
            self.send(m.Serve(stage, capacity))

    def serve(self, stage: m.StageName, capacity: int) -> None:
        self.capacity[stage] = capacity
        self.send(m.Serve(stage, capacity))

    def heartbeat(self) -> None:
        if self.epoch is not None:
            self.send(m.Heartbeat(tuple(self.held), dict(self._newest_seen), m.PeerStatus()))

    def complete(self, assignment: Assignment, payload: m.Payload = ()) -> None:
        if self.held.pop(assignment.lease, 0) is None:
            self.send(m.Complete(assignment.lease), payload)

    def release(self, assignment: Assignment, delay_s: float) -> None:
        if self.held.pop(assignment.lease, 0) is None:
            self.send(m.Release(assignment.lease, delay_s, "cannot be done now"))

    def receive(self) -> Assignment | m.FromBroker:
        """Take the next message; what the client does by itself is done."""
        message, payload = self.link.down.popleft()
        match message:
            case m.Assign(lease):
                self.held[lease] = None
                self._newest_seen[lease.stage] = max(lease.lease, self._newest_seen.get(lease.stage, 0))
                return Assignment(lease, payload)
            case m.Welcome(epoch, _, state):
                self.epoch = epoch
                self.held.clear()
                self._newest_seen.clear()
                self._set_state(state)
            case m.StateUpdate(state):
                self._set_state(state)
            case m.Who() if self.wire.now - self.said_hello_at > HEARTBEAT_S:
                self.hello()
        return message

    def _set_state(self, state: m.RunState | None) -> None:
        if state is not None and self.role != "learner":
            self.state = state


# --------------------------------------------------------------------------- workers


@dataclass
class Task:
    """One lease in a worker's hands. `versions`: of the weights drawn from so far; empty: not begun."""

    assignment: Assignment
    ticket: m.Ticket
    done_at: float
    incarnation: int = -1
    versions: list[int] = field(default_factory=list)


class SimWorker:
    """What actors and rewarders share."""

    role: m.Role
    stage: m.StageName

    def __init__(self, wire: Wire, name: str, capacity: int) -> None:
        self.alive = True
        self.running = True
        self.leaving = False
        self.tasks: list[Task] = []
        self.answers: list[tuple[m.Complete, m.Payload]] = []  # all that were sent
        self.capacity = capacity
        self.client = SimClient(wire, name, self.role)

    def receive(self) -> None:
        received = self.client.receive()
        if isinstance(received, Assignment):
            ticket: m.Ticket = m.decode(received.payload[0], m.Ticket)
            self.tasks.append(Task(received, ticket, self.client.wire.now + self.work_s(ticket)))

    def moves(self) -> Iterator[Move]:
        """What it can do next by itself, the most natural first."""
        raise NotImplementedError

    def work_s(self, ticket: m.Ticket) -> float:
        """How long a task takes in this worker's hands: some are stragglers."""
        return 0.5 + sum(f"{self.client.name}/{ticket.ticket_id}".encode()) % 5

    def is_done(self, task: Task) -> bool:
        return self.client.wire.now >= task.done_at

    def answer(self, task: Task) -> m.Payload:
        """The right result of a task."""
        raise NotImplementedError

    def finish(self, task: Task) -> None:
        self.tasks.remove(task)
        payload = self.answer(task)
        self.answers.append((m.Complete(task.assignment.lease), payload))
        self.client.complete(task.assignment, payload)

    def give_up(self, task: Task) -> None:
        """The task has failed: an outage, an engine's error."""
        self.tasks.remove(task)
        self.client.release(task.assignment, OUTAGE_S)

    def drain(self) -> None:
        """Begin to leave politely."""
        self.leaving = True
        self.client.serve(self.stage, 0)

    def say_bye(self) -> None:
        self.client.send(m.Bye())


class SimActor(SimWorker):
    """Generates; the text of a sample says whose weights drew it: incarnation/ticket/first version."""

    role: m.Role = "actor"
    stage: m.StageName = "rollout"

    def __init__(self, wire: Wire, name: str, capacity: int) -> None:
        super().__init__(wire, name, capacity)
        self.weights = (-1, -1)
        self.loading: m.RunState | None = None
        self.loaded_at = 0.0

    def moves(self) -> Iterator[Move]:
        state = self.client.state
        if self.loading is not None:
            if self.client.wire.now >= self.loaded_at:
                yield self.end_load
        elif state is not None and state.weights_endpoint and (state.incarnation, state.version) != self.weights:
            yield self.begin_load
        for task in self.tasks:
            if task.versions:
                if self.is_done(task):
                    yield partial(self.finish, task)
            elif self.may_generate(task.ticket):
                yield partial(self.begin, task)

    def begin_load(self) -> None:
        """Pull the newest weights; those of another learner void what the old one's have begun."""
        self.loading = self.client.state
        self.loaded_at = self.client.wire.now + LOAD_S
        assert self.loading is not None
        if self.loading.incarnation != self.weights[0]:
            for task in [task for task in self.tasks if task.versions]:
                self.give_up(task)

    def end_load(self) -> None:
        assert self.loading is not None
        first = self.weights[0] < 0
        self.weights = (self.loading.incarnation, self.loading.version)
        self.loading = None
        for task in self.tasks:
            if task.versions:
                task.versions.append(self.weights[1])
        if first and not self.leaving:
            self.client.serve("rollout", self.capacity)

    def may_generate(self, ticket: m.Ticket) -> bool:
        state = self.client.state
        incarnation, version = self.weights
        return state is not None and incarnation == state.incarnation and version >= ticket.min_version

    def begin(self, task: Task) -> None:
        if task.assignment.lease not in self.client.held:
            self.tasks.remove(task)
            return
        task.incarnation, task.versions = self.weights[0], [self.weights[1]]
        task.done_at = self.client.wire.now + self.work_s(task.ticket)

    def answer(self, task: Task) -> m.Payload:
        text = f"{task.incarnation}/{task.ticket.ticket_id}/{task.versions[0]}"
        return m.encode_rollout(rollout(task.ticket.ticket_id, self.client.name, text, task.versions))


class SimRewarder(SimWorker):
    """Scores; a score's query says which text it is of."""

    role: m.Role = "rewarder"
    stage: m.StageName = "score"

    def __init__(self, wire: Wire, name: str, capacity: int) -> None:
        super().__init__(wire, name, capacity)
        self.client.serve("score", capacity)

    def moves(self) -> Iterator[Move]:
        return (partial(self.finish, task) for task in self.tasks if self.is_done(task))

    def answer(self, task: Task) -> m.Payload:
        header: m.RolloutHeader = m.decode(task.assignment.payload[1], m.RolloutHeader)
        scores = tuple(score_of(sample.text, index) for index, sample in enumerate(header.samples))
        return [m.encode(m.GroupScores(header.ticket_id, self.client.name, scores))]


def rollout(ticket_id: int, actor: str, text: str, versions: list[int], samples: int = SAMPLES) -> m.Rollout:
    """A group whose tokens were drawn with these versions, one after the other."""
    kept = [versions[0], *versions[1:][1 - TOKENS :]]
    spans = [m.WeightSpan(version, index, index + 1) for index, version in enumerate(kept)]
    spans[-1] = m.WeightSpan(kept[-1], len(kept) - 1, TOKENS)
    sample = m.SampleHeader(text, TOKENS, "stop", tuple(spans))
    return m.Rollout(
        m.RolloutHeader(ticket_id, actor, 1, (sample,) * samples),
        np.zeros(1, np.int32),
        np.zeros(samples * TOKENS, np.int32),
        np.zeros(samples * TOKENS, np.float32),
    )


def score_of(text: str, index: int) -> Scored:
    """Every fourth text is worth the same in all its samples."""
    teaches = sum(text.encode()) % 4 != 0
    return Scored(float(index) if teaches else 0.0, {}, text, 1)
