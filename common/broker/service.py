"""What the broker does with a message, without sockets or clocks: a pure core around three `Stage`s.

    learner ──Submit──► rollout ──► actor ──Complete──► score ──► rewarder ──Complete──► train ──► learner

Payload of an item, by stage:

* `rollout`: ticket.                                        An actor is sent all of it.
* `score`:   ticket, rollout header, three array frames.    A rewarder is sent ticket and header only.
* `train`:   ticket, header, three arrays, scores.          The learner is sent all of it.

`handle` returns the answers to one message, `tick` what is due after several: work, slots, statuses. A stage grants
only while the stage after it has room for the results, so backpressure reaches the actors and what was generated need
not be thrown away. In items that is exact: leases and the items of the next stage together never exceed its bound. In
bytes it goes by the size of recent results. A result that finds its stage full all the same, because results have
become much larger, is not taken: its lease is released, and the work is done again when there is room. The broker
keeps no durable state: after a restart the learner submits its outstanding tickets again, and results under the old
broker's leases are late.

What a peer can be sent without reading any of it: leases up to its credit, never more than `MAX_CREDIT` per stage;
slots of the quota up to `MAX_SLOT_REQUESTS`; one answer per message it sends, a shared result of 1 MiB at most; one
`StateUpdate` per version. The socket bounds the sum: a peer whose pipe is full is `unreachable` and forgotten.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from common import cache_messages as c
from common import messages as m
from common.adaptive_quota import AdaptivePool
from common.broker import sharing
from common.broker.conduct import Conduct
from common.broker.quota_desk import QuotaDesk
from common.quota import SlotPool
from common.score_order import place_of
from common.stages import Offer, Stage

logger = logging.getLogger(__name__)

Frames = list[bytes | memoryview]

NEXT_STAGE: dict[m.StageName, m.StageName | None] = {"rollout": "score", "score": "train", "train": None}
CONSUMER: dict[m.StageName, m.Role] = {"rollout": "actor", "score": "rewarder", "train": "learner"}
FRAMES_SENT: dict[m.StageName, int | None] = {"rollout": None, "score": 2, "train": None}

LEASES_PER_MS = 1 << 11  # 2**53, the bound of a number on the wire, is reached in the year 2109
MAX_CREDIT = 1024  # leases of one stage in one peer's hands, whatever it declares
MAX_PEERS = 4096  # peers remembered, well-behaved or not; the longest silent is forgotten first
RETRY_FULL_S = 1.0  # how long an item waits whose result found no room
STATUS_EVERY_S = 0.05  # requests for the status that come closer together are answered together


class Outgoing(NamedTuple):
    """One message to one peer."""

    peer: str
    message: m.AnyFromBroker
    payload: m.Payload = ()


class Work(NamedTuple):
    """What an item carries: its frames, the number of samples that every result of it must have, and what its place
    in a queue depends on: whether it is held out, and the oldest policy version among its tokens, once there are any.
    """

    frames: Frames
    samples: int
    evaluation: bool = False
    version: int = 0


@dataclass(slots=True)
class _Peer:
    role: m.Role
    last_seen: float
    status: m.PeerStatus = field(default_factory=m.PeerStatus)


@dataclass(frozen=True)
class BrokerSettings:
    """Bounds and times of a broker. `quota` is (requests, window in s, hard deadline in s) or None; `quota_mode` which
    guarantee it has (`common.quota`, `common.adaptive_quota`).

    `epoch` tells brokers of one run apart: the time of its start in milliseconds since 1970. A client's queued answers
    to an earlier broker can reach this one, so the lease numbers of two brokers must not meet: they count up from
    `epoch * LEASES_PER_MS`, which this broker would have to exceed for its whole life to meet its successor's.
    """

    epoch: int
    lease_s: float = 60.0
    heartbeat_s: float = 1.0
    queue_items: int = 100_000
    queue_bytes: int = 2 << 30
    quota: tuple[int, float, float] | None = None
    quota_mode: Literal["strict", "adaptive"] = "strict"
    bad_frames_allowed: int = 8
    ban_s: float = 60.0
    shared_bytes: int = 256 << 20

    @property
    def first_lease(self) -> int:
        """The number of this broker's first lease."""
        return self.epoch * LEASES_PER_MS + 1


class BrokerService:
    """The broker's decisions. All times are seconds on the caller's monotonic clock."""

    def __init__(self, settings: BrokerSettings, now: float) -> None:
        self.settings = settings
        self.stages: dict[m.StageName, Stage[Work]] = {
            name: Stage(name, settings.lease_s, settings.queue_items, settings.queue_bytes, settings.first_lease)
            for name in NEXT_STAGE
        }
        self.quota = QuotaDesk(_slot_pool(settings, now))
        self.state: m.RunState | None = None
        self.conduct = Conduct(settings.bad_frames_allowed, settings.ban_s, settings.heartbeat_s, MAX_PEERS)
        self.handled_messages = 0
        self.sharing = sharing.Sharing(settings.shared_bytes, now)
        self.rejected_frames = 0
        self._peers: OrderedDict[str, _Peer] = OrderedDict()  # the longest silent first
        self._status_wanted: dict[str, None] = {}
        self._status_due = self._ban_logged_at = float("-inf")

    # ------------------------------------------------------------------ entry points

    def handle(self, peer: str, role: m.Role, message: m.AnyToBroker, payload: m.Payload, now: float) -> list[Outgoing]:
        """Apply one decoded message of an authenticated peer (`role` is what its key was made for)."""
        self.handled_messages += 1
        known = self._peers.get(peer)
        try:
            if known is not None and known.role != role:
                raise m.MessageError(f"the name {peer!r} belongs to a {known.role}")
            if payload and not isinstance(message, m.Complete | m.Submit | c.CachePut):
                raise m.MessageError(f"{type(message).__name__} has no payload, this one has {len(payload)} frames")
            if isinstance(message, m.Hello):
                return self._hello(peer, role, message, now)
            if known is None:
                return [Outgoing(peer, m.Who())] if self.conduct.may_ask((role, peer), now) else []
            known.last_seen = now
            self._peers.move_to_end(peer)
            self.quota.heard(peer)
            return self._dispatch(peer, known, message, payload, now)
        except m.MessageError as error:
            return self.bad_frame(peer, role, str(error), now)

    def banned(self, peer: str, role: m.Role, now: float) -> bool:
        """Whether a message of this peer is to be dropped unread."""
        return self.conduct.banned((role, peer), now)

    def bad_frame(self, peer: str, role: m.Role, reason: str, now: float) -> list[Outgoing]:
        """A bad message of an authenticated peer: count it, and after a few do not listen to the peer for a while."""
        self.rejected_frames += 1
        source = (role, peer)
        if self.conduct.bad_frame(source, now):
            self._log_ban(source, reason, now)
            known = self._peers.get(peer)
            if known is not None and known.role == role:
                self._forget(peer)
        return [Outgoing(peer, m.Protest(reason[:1000]))] if self.conduct.may_protest(source) else []

    def _log_ban(self, source: tuple[m.Role, str], reason: str, now: float) -> None:
        if now - self._ban_logged_at >= 1.0:  # an attacker under many names must not fill the disk
            self._ban_logged_at = now
            logger.warning(
                "%s %r sent bad frames and is ignored for %g s (ban %d): %s",
                *source,
                self.settings.ban_s,
                self.conduct.bans,
                reason[:200],
            )

    def unreachable(self, peer: str) -> None:
        """Nothing can be sent to a peer: it is gone, or it does not read. Its work goes to others."""
        self._forget(peer)

    def undelivered(self, message: m.FromBroker | c.CacheFromBroker, now: float) -> None:
        """A message was not sent at all: a slot that it grants will not be used."""
        if isinstance(message, m.SlotGrant):
            self.quota.undelivered(message, now)

    def tick(self, now: float) -> list[Outgoing]:
        """What is due: leases expire, silent peers are forgotten, work, slots and statuses go out.

        To be called after every few messages, and when `next_event` has come.
        """
        for stage in self.stages.values():
            stage.expire(now)
        while self._peers:
            peer, known = next(iter(self._peers.items()))
            if now - known.last_seen <= self.settings.lease_s:
                break
            self._forget(peer)  # all it held has expired: give it nothing more before it is heard of again
        return [
            *self._assign(now),
            *[Outgoing(*grant) for grant in self.quota.outgoing(now)],
            *self._answer_status(now),
            *[Outgoing(*answer) for answer in self.sharing.outgoing(now)],
        ]

    def next_event(self) -> float | None:
        """When `tick` has something to do by itself, apart from forgetting silent peers, which is not urgent."""
        sources = [stage.next_event() for stage in self.stages.values()]
        sources += [self.quota.next_event(), self.sharing.next_event()]
        if self._status_wanted:
            sources.append(self._status_due)
        return min((time for time in sources if time is not None), default=None)

    # ------------------------------------------------------------------ peers

    def _hello(self, peer: str, role: m.Role, message: m.Hello, now: float) -> list[Outgoing]:
        if message.role != role:
            raise m.MessageError(f"a key of role {role!r} cannot act as {message.role!r}")
        state = self.state
        if role == "learner" and state is not None and message.incarnation < state.incarnation:
            # Not admitted: two learners would clear each other's work for ever.
            return [Outgoing(peer, m.Superseded(state.incarnation))]
        self._forget(peer)
        self._peers[peer] = _Peer(role, now)
        if len(self._peers) > MAX_PEERS:
            self._forget(next(iter(self._peers)))
        updates: list[Outgoing] = []
        if role == "learner":
            for other in [name for name, known in self._peers.items() if known.role == "learner" and name != peer]:
                self._forget(other)
            if state is None or state.incarnation != message.incarnation:
                updates = self._new_learner(message.incarnation)
        return [Outgoing(peer, m.Welcome(self.settings.epoch, self.settings.heartbeat_s, self.state)), *updates]

    def _new_learner(self, incarnation: int) -> list[Outgoing]:
        """Work for an earlier learner is void: its tickets are submitted again by the new one."""
        for stage in self.stages.values():
            stage.clear()
        return self._set_state(m.RunState(incarnation=incarnation, version=0))

    def _set_state(self, state: m.RunState) -> list[Outgoing]:
        if state == self.state:
            return []
        self.state = state
        return [Outgoing(peer, m.StateUpdate(state)) for peer in self._peers]

    def _forget(self, peer: str) -> None:
        if self._peers.pop(peer, None) is None:
            return
        self._status_wanted.pop(peer, None)
        for stage in self.stages.values():
            stage.leave(peer)
        self.quota.leave(peer)
        self.sharing.leave(peer)

    # ------------------------------------------------------------------ messages

    def _dispatch(
        self, peer: str, known: _Peer, message: m.AnyToBroker, payload: m.Payload, now: float
    ) -> list[Outgoing]:
        match message:
            case m.Complete(lease):
                self._require(known, CONSUMER[lease.stage], message)
                self._complete(peer, lease, payload, now)
            case m.Heartbeat():
                known.status = message.status
                self._renew(peer, message, now)
            case m.Release(lease, delay_s):
                self._require(known, CONSUMER[lease.stage], message)
                self.stages[lease.stage].release(lease.item, lease.lease, peer, now + delay_s)
            case m.Serve(stage, capacity):
                self._require(known, CONSUMER[stage], message)
                self.stages[stage].serve(peer, min(capacity, MAX_CREDIT))
            case m.Submit(tickets):
                self._require(known, "learner", message)
                return self._submit(peer, tickets, payload)
            case m.Announce(state):
                self._require(known, "learner", message)
                return self._announce(peer, state)
            case c.CacheGet() | c.CachePut() | c.CacheFailed() | c.CacheRenew():
                self._require(known, "rewarder", message)
                self.sharing.handle(peer, message, payload, now)
            case m.SlotRequest() | m.SlotReplied() | m.SlotThrottled():
                self._require(known, "rewarder", message)
                self.quota.handle(peer, message, now)
            case m.StatusRequest():
                self._status_wanted[peer] = None
            case m.Bye():
                self._forget(peer)
        return []

    def _require(self, known: _Peer, role: m.Role, message: m.AnyToBroker) -> None:
        if known.role != role:
            raise m.MessageError(f"{type(message).__name__} is for the {role}, this peer is a {known.role}")

    def _submit(self, peer: str, tickets: Sequence[int], payload: m.Payload) -> list[Outgoing]:
        if len(tickets) != len(payload):
            raise m.MessageError(f"{len(tickets)} tickets named but {len(payload)} sent")
        decoded: list[m.Ticket] = [m.decode(frame, m.Ticket) for frame in payload]
        if (carried := [ticket.ticket_id for ticket in decoded]) != list(tickets):
            raise m.MessageError(f"the tickets named are not those sent, which are {carried[:10]} ...")
        refused = []
        for ticket, frame in zip(decoded, payload, strict=True):
            if any(ticket.ticket_id in stage for stage in self.stages.values()):
                continue  # submitted again after a lost connection
            work = Work([frame], ticket.sampling.samples, ticket.kind == "eval")
            priority = self._priority("rollout", ticket.ticket_id, work)
            if self.stages["rollout"].offer(ticket.ticket_id, work, len(frame), priority) is Offer.FULL:
                refused.append(ticket.ticket_id)
        return [Outgoing(peer, m.Refused(tuple(refused), "the rollout queue is full"))] if refused else []

    def _announce(self, peer: str, state: m.RunState) -> list[Outgoing]:
        if self.state is not None and state.incarnation < self.state.incarnation:
            return [Outgoing(peer, m.Superseded(self.state.incarnation))]
        return self._set_state(state)

    def _complete(self, peer: str, lease: m.LeaseRef, payload: m.Payload, now: float) -> None:
        stage, following = self.stages[lease.stage], NEXT_STAGE[lease.stage]
        version = self._check_result(lease, payload, stage.payload_of(lease.item))
        if following is not None and not self.stages[following].room:
            if stage.release(lease.item, lease.lease, peer, now + RETRY_FULL_S):
                logger.warning("stage %s is full: item %d will be done again", following, lease.item)
            return
        item = stage.complete(lease.item, lease.lease, peer)
        if item is None or following is None:
            return  # late (the item went to another worker or is done), or the learner has it
        size = item.size + sum(map(len, payload))
        work = item.payload._replace(frames=[*item.payload.frames, *payload], version=version)
        self.stages[following].offer(lease.item, work, size, self._priority(following, lease.item, work))

    def _priority(self, stage: m.StageName, item: int, work: Work) -> tuple[int, ...]:
        """Held-out first; then by ticket, or in the order in which groups are to be scored."""
        return (
            place_of(work.version, item, work.evaluation) if stage == "score" else (0 if work.evaluation else 1, item)
        )

    def _check_result(self, lease: m.LeaseRef, payload: m.Payload, work: Work | None) -> int:
        """A result is validated before it replaces the lease: a garbled one must not lose the item. Returns the oldest
        policy version of a rollout, 0 for other results.

        What passes here never fails in the learner: else its group would be delivered again and again.
        """
        if lease.stage == "train":
            if payload:
                raise m.MessageError(f"what the learner completes has no result, this one has {len(payload)} frames")
            return 0
        if lease.stage == "rollout":
            header = m.decode_rollout(payload).header
            ticket_id, samples, version = header.ticket_id, len(header.samples), header.oldest_version
        else:
            if len(payload) != 1:
                raise m.MessageError(f"scores come in 1 frame, not {len(payload)}")
            scores: m.GroupScores = m.decode(payload[0], m.GroupScores)
            ticket_id, samples, version = scores.ticket_id, len(scores.scores), 0
        if ticket_id != lease.item:
            raise m.MessageError(f"the result of item {lease.item} names ticket {ticket_id}")
        if work is not None and samples != work.samples:
            raise m.MessageError(f"item {lease.item} has {work.samples} samples, its result has {samples}")
        return version

    def _renew(self, peer: str, heartbeat: m.Heartbeat, now: float) -> None:
        by_stage: dict[m.StageName, list[int]] = {name: [] for name in self.stages}
        for reference in heartbeat.held:
            by_stage[reference.stage].append(reference.lease)
        for name, leases in by_stage.items():
            self.stages[name].renew(peer, leases, heartbeat.newest_seen.get(name, 0), now)

    # ------------------------------------------------------------------ what goes out

    def _assign(self, now: float) -> list[Outgoing]:
        outgoing = []
        for name, stage in self.stages.items():
            following = NEXT_STAGE[name]
            room = None if following is None else self.stages[following].room_for_results(stage.leased)
            for grant in stage.grant(now, limit=room):
                assign = m.Assign(m.LeaseRef(name, grant.item_id, grant.lease))
                outgoing.append(Outgoing(grant.worker, assign, grant.payload.frames[: FRAMES_SENT[name]]))
        return outgoing

    def _answer_status(self, now: float) -> list[Outgoing]:
        if not self._status_wanted or now < self._status_due:
            return []
        status = self.status(now)
        answers = [Outgoing(peer, status) for peer in self._status_wanted]
        self._status_wanted.clear()
        self._status_due = now + STATUS_EVERY_S
        return answers

    # ------------------------------------------------------------------ status

    def status(self, now: float) -> m.StatusReply:
        """The whole fleet at a glance."""
        slots = self.quota.pool
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
            for name, known in sorted(self._peers.items())
        )
        return m.StatusReply(
            stages,
            peers,
            slots.in_use if slots else 0,
            slots.granted if slots else 0,
            self.rejected_frames,
            slots.refused if slots else 0,
            slots.phase(now) if slots else "",
            self.quota.waits_for(now),
        )


def _slot_pool(settings: BrokerSettings, now: float) -> SlotPool | None:
    if settings.quota is None:
        return None
    pool = AdaptivePool if settings.quota_mode == "adaptive" else SlotPool
    return pool(*settings.quota, now=now, first_grant=settings.first_lease)
