"""What the broker does with a message, without sockets or clocks: a pure core around three `Stage`s.

    learner ──Submit──► rollout ──► actor ──Complete──► score ──► rewarder ──Complete──► train ──► learner

Payload of an item, by stage:

* `rollout`: ticket.                                        An actor is sent all of it.
* `score`:   ticket, rollout header, three array frames.    A rewarder is sent ticket and header only.
* `train`:   ticket, header, three arrays, scores.          The learner is sent all of it.

`handle` and `tick` return the messages to send. A stage grants only while the stage after it has room for the
results, so backpressure reaches the actors and nothing that was generated has to be thrown away. The broker
keeps no durable state: after a restart the learner submits its outstanding tickets again, and results under the
old broker's leases are late.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from common import messages as m
from common.quota import SlotPool
from common.stages import Offer, Stage

Frames = list[bytes | memoryview]

NEXT_STAGE: dict[m.StageName, m.StageName | None] = {"rollout": "score", "score": "train", "train": None}
CONSUMER: dict[m.StageName, m.Role] = {"rollout": "actor", "score": "rewarder", "train": "learner"}
FRAMES_SENT: dict[m.StageName, int | None] = {"rollout": None, "score": 2, "train": None}


@dataclass(frozen=True)
class Outgoing:
    """One message to one peer."""

    peer: str
    message: m.FromBroker
    payload: m.Payload = ()


@dataclass
class _Peer:
    role: m.Role
    last_seen: float
    status: m.PeerStatus = field(default_factory=m.PeerStatus)
    bad_frames: int = 0


@dataclass(frozen=True)
class BrokerSettings:
    """Bounds and times of a broker. `quota` is (requests, window in s, hard deadline in s) or None."""

    epoch: int
    lease_s: float = 60.0
    heartbeat_s: float = 1.0
    queue_items: int = 100_000
    queue_bytes: int = 2 << 30
    quota: tuple[int, float, float] | None = None
    bad_frames_allowed: int = 8


class BrokerService:
    """The broker's decisions. All times are seconds on the caller's monotonic clock."""

    def __init__(self, settings: BrokerSettings, now: float) -> None:
        self.settings = settings
        self.stages: dict[m.StageName, Stage[Frames]] = {
            name: Stage(name, settings.lease_s, settings.queue_items, settings.queue_bytes) for name in NEXT_STAGE
        }
        self.slots = SlotPool(*settings.quota, now=now) if settings.quota else None
        self.state: m.RunState | None = None
        self.rejected_frames = 0
        self._peers: dict[str, _Peer] = {}

    # ------------------------------------------------------------------ entry points

    def handle(self, peer: str, role: m.Role, message: m.ToBroker, payload: m.Payload, now: float) -> list[Outgoing]:
        """Apply one decoded message of an authenticated peer (`role` is what its key was made for)."""
        known = self._peers.get(peer)
        if isinstance(message, m.Hello):
            return self._hello(peer, role, message, now)
        if known is None:
            return [Outgoing(peer, m.Who())]
        known.last_seen = now
        try:
            replies = self._dispatch(peer, known, message, payload, now)
        except m.MessageError as error:
            return self.protest(peer, str(error))
        return replies + self._assign(now)

    def tick(self, now: float) -> list[Outgoing]:
        """Time has passed: leases expire, slots free themselves, silent peers are forgotten."""
        for stage in self.stages.values():
            stage.expire(now)
        for peer, known in list(self._peers.items()):
            if now - known.last_seen > 2 * self.settings.lease_s:
                self._forget(peer)
        return self._assign(now)

    def next_event(self) -> float | None:
        """When `tick` has something to do at the latest."""
        sources = [stage.next_event() for stage in self.stages.values()]
        if self.slots is not None:
            sources.append(self.slots.next_event())
        return min((time for time in sources if time is not None), default=None)

    def protest(self, peer: str, reason: str) -> list[Outgoing]:
        """A bad frame of an authenticated peer: count it, and drop the peer after a few."""
        self.rejected_frames += 1
        known = self._peers.get(peer)
        if known is not None:
            known.bad_frames += 1
            if known.bad_frames > self.settings.bad_frames_allowed:
                self._forget(peer)
        return [Outgoing(peer, m.Protest(reason[:1000]))]

    # ------------------------------------------------------------------ messages

    def _hello(self, peer: str, role: m.Role, message: m.Hello, now: float) -> list[Outgoing]:
        if message.role != role:
            return self.protest(peer, f"a key of role {role!r} cannot act as {message.role!r}")
        self._forget(peer)
        self._peers[peer] = _Peer(role, now)
        outgoing: list[Outgoing] = []
        if role == "learner":
            for other in [name for name, known in self._peers.items() if known.role == "learner" and name != peer]:
                self._forget(other)
            if self.state is None or self.state.incarnation != message.incarnation:
                outgoing = self._new_learner(message.incarnation)
        return [Outgoing(peer, m.Welcome(self.settings.epoch, self.settings.heartbeat_s, self.state)), *outgoing]

    def _new_learner(self, incarnation: int) -> list[Outgoing]:
        """Work for an earlier learner is void: its tickets are submitted again by the new one."""
        for stage in self.stages.values():
            stage.clear()
        return self._set_state(m.RunState(incarnation=incarnation, version=0))

    def _set_state(self, state: m.RunState) -> list[Outgoing]:
        self.state = state
        return [Outgoing(peer, m.StateUpdate(state)) for peer in self._peers]

    def _dispatch(self, peer: str, known: _Peer, message: m.ToBroker, payload: m.Payload, now: float) -> list[Outgoing]:
        match message:
            case m.Heartbeat():
                known.status = message.status
                self._renew(peer, message, now)
            case m.Complete(lease):
                self._require(known, CONSUMER[lease.stage], message)
                self._complete(lease, payload)
            case m.Release(lease, delay_s):
                self._require(known, CONSUMER[lease.stage], message)
                self.stages[lease.stage].release(lease.item, lease.lease, now + delay_s)
            case m.Serve(stage, capacity):
                self._require(known, CONSUMER[stage], message)
                self.stages[stage].serve(peer, capacity)
            case m.Submit(tickets):
                self._require(known, "learner", message)
                return self._submit(peer, tickets, payload)
            case m.Announce(state):
                self._require(known, "learner", message)
                return self._set_state(state)
            case m.SlotRequest(request):
                self._require(known, "rewarder", message)
                if self.slots is None:
                    raise m.MessageError("this run has no quota: search.quota is not set")
                self.slots.request(peer, request)
            case m.SlotReplied(slot, grant):
                if self.slots is not None:
                    self.slots.replied(slot, grant, now)
            case m.StatusRequest():
                return [Outgoing(peer, self.status(now))]
            case m.Bye():
                self._forget(peer)
        return []

    def _require(self, known: _Peer, role: m.Role, message: m.ToBroker) -> None:
        if known.role != role:
            raise m.MessageError(f"{type(message).__name__} is for the {role}, this peer is a {known.role}")

    def _submit(self, peer: str, tickets: Sequence[int], payload: m.Payload) -> list[Outgoing]:
        if len(tickets) != len(payload):
            raise m.MessageError(f"{len(tickets)} tickets named but {len(payload)} sent")
        decoded: list[m.Ticket] = [m.decode(frame, m.Ticket) for frame in payload]
        refused = []
        for ticket_id, ticket, frame in zip(tickets, decoded, payload, strict=True):
            if ticket.ticket_id != ticket_id:
                raise m.MessageError(f"ticket {ticket_id} carries the id {ticket.ticket_id}")
            if any(ticket_id in stage for stage in self.stages.values()):
                continue  # submitted again after a lost connection
            priority = (0 if ticket.kind == "eval" else 1, ticket_id)
            if self.stages["rollout"].offer(ticket_id, [frame], len(frame), priority) is Offer.FULL:
                refused.append(ticket_id)
        return [Outgoing(peer, m.Refused(tuple(refused), "the rollout queue is full"))] if refused else []

    def _complete(self, lease: m.LeaseRef, payload: m.Payload) -> None:
        self._check_result(lease, payload)
        item = self.stages[lease.stage].complete(lease.item, lease.lease)
        following = NEXT_STAGE[lease.stage]
        if item is None or following is None:
            return  # late (the item went to another worker or is done), or the learner has it
        size = item.size + sum(memoryview(frame).nbytes for frame in payload)
        self.stages[following].offer(lease.item, [*item.payload, *payload], size, item.priority, force=True)

    def _check_result(self, lease: m.LeaseRef, payload: m.Payload) -> None:
        """A result is validated before it replaces the lease: a garbled one must not lose the item."""
        if lease.stage == "rollout":
            ticket_id = m.decode_rollout(payload).header.ticket_id
        elif lease.stage == "score":
            if len(payload) != 1:
                raise m.MessageError(f"scores come in 1 frame, not {len(payload)}")
            ticket_id = m.decode(payload[0], m.GroupScores).ticket_id
        else:
            ticket_id = lease.item
        if ticket_id != lease.item:
            raise m.MessageError(f"the result of item {lease.item} names ticket {ticket_id}")

    def _renew(self, peer: str, heartbeat: m.Heartbeat, now: float) -> None:
        by_stage: dict[m.StageName, list[int]] = {name: [] for name in self.stages}
        for reference in heartbeat.held:
            by_stage[reference.stage].append(reference.lease)
        for name, leases in by_stage.items():
            self.stages[name].renew(peer, leases, heartbeat.newest_seen.get(name, 0), now)

    # ------------------------------------------------------------------ outgoing work

    def _assign(self, now: float) -> list[Outgoing]:
        outgoing: list[Outgoing] = []
        for name, stage in self.stages.items():
            following = NEXT_STAGE[name]
            room = None if following is None else max(0, self.stages[following].room - stage.leased)
            for grant in stage.grant(now, limit=room):
                assign = m.Assign(m.LeaseRef(name, grant.item_id, grant.lease))
                outgoing.append(Outgoing(grant.worker, assign, grant.payload[: FRAMES_SENT[name]]))
        if self.slots is not None:
            use_within_s = USE_GRANT_WITHIN_S
            outgoing.extend(
                Outgoing(granted.worker, m.SlotGrant(granted.request, granted.slot, granted.grant, use_within_s))
                for granted in self.slots.grant(now)
            )
        return outgoing

    def _forget(self, peer: str) -> None:
        if self._peers.pop(peer, None) is None:
            return
        for stage in self.stages.values():
            stage.leave(peer)
        if self.slots is not None:
            self.slots.leave(peer)

    # ------------------------------------------------------------------ status

    def status(self, now: float) -> m.StatusReply:
        """The whole fleet at a glance."""
        stages = {
            name: m.StageStatus(stage.queued, stage.leased, stage.bytes, stage.expired, stage.late)
            for name, stage in self.stages.items()
        }
        peers = tuple(
            m.PeerEntry(
                name,
                known.role,
                sum(stage.leases_of(name) for stage in self.stages.values()),
                max(0.0, now - known.last_seen),
                known.status,
            )
            for name, known in self._peers.items()
        )
        return m.StatusReply(
            stages,
            peers,
            self.slots.in_use if self.slots else 0,
            self.slots.granted if self.slots else 0,
            self.rejected_frames,
        )


USE_GRANT_WITHIN_S = 0.5  # a granted slot that its worker did not use by then must not be used any more
