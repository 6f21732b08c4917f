"""Everything that crosses a process boundary, as typed MessagePack.

A message on the wire is a list of ZeroMQ frames: frame 0 is one of the tagged structs `ToBroker` or
`FromBroker`, the others are payload. Payload frames travel through the broker as they came: arrays are raw
little-endian bytes, never copied into MessagePack. Decoding checks types, sizes and counts; anything else
raises `MessageError`, and no handler runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from common.cache_messages import CacheFromBroker, CacheToBroker
from common.scores import InvalidOutput, Scored

if TYPE_CHECKING:  # a rewarder never sees an array, and starts faster without numpy
    import numpy as np
    from numpy.typing import NDArray

MAX_SAMPLES = 4096  # samples in one group
MAX_TOKENS = 1 << 20  # tokens in one sample
MAX_TICKETS = 4096  # tickets in one submission
MAX_RETRY_AFTER_S = 60.0  # a service that asks for longer is asked again then

Role = Literal["learner", "actor", "rewarder", "monitor"]
StageName = Literal["rollout", "score", "train"]
Name = Annotated[str, Meta(min_length=1, max_length=128)]
Text = Annotated[str, Meta(max_length=1 << 22)]
Count = Annotated[int, Meta(ge=0, le=1 << 53)]
Seconds = Annotated[float, Meta(ge=0, le=1e6)]
Rate = Annotated[int, Meta(ge=0, le=1_000_000)]

FinalScore = Scored | InvalidOutput  # what may be trained on; an `Unavailable` releases the group instead
Payload = Sequence[bytes | memoryview]


class MessageError(ValueError):
    """A frame is not what the protocol says; the message names the part that is wrong."""


# --------------------------------------------------------------------------- what the stages carry


class ChatMessage(Struct, frozen=True, forbid_unknown_fields=True):
    """One message of a prompt."""

    role: Name
    content: Text


class Sampling(Struct, frozen=True, forbid_unknown_fields=True):
    """How a group is drawn. `temperature` 0 is greedy."""

    samples: Annotated[int, Meta(ge=1, le=MAX_SAMPLES)]
    temperature: Annotated[float, Meta(ge=0, le=100)]
    top_p: Annotated[float, Meta(gt=0, le=1)]
    max_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
    seed: Count | None = None


class Ticket(Struct, frozen=True, forbid_unknown_fields=True):
    """The learner's permission to generate one group: `sampling.samples` answers to one prompt.

    `min_version` is the oldest policy version whose weights may generate it; with admission control this is
    what turns `max_staleness` into a guarantee (see `learner.admission`). `reference` is what the task needs
    to score an answer (relevant ids, last allowed date, …).
    """

    ticket_id: Count
    kind: Literal["train", "eval"]
    prompt_id: Name
    epoch: Count
    messages: Annotated[tuple[ChatMessage, ...], Meta(min_length=1, max_length=64)]
    reference: dict[str, Any]
    sampling: Sampling
    min_version: Count


class WeightSpan(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Tokens `start` to `end` (exclusive) of a response were sampled with policy version `version`."""

    version: Count
    start: Count
    end: Count


class SampleHeader(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One sample of a group, without its arrays."""

    text: Text
    tokens: Annotated[int, Meta(ge=0, le=MAX_TOKENS)]
    finish_reason: Literal["stop", "length"]
    spans: Annotated[tuple[WeightSpan, ...], Meta(max_length=4096)]


class RolloutHeader(Struct, frozen=True, forbid_unknown_fields=True):
    """A generated group; its arrays follow in three frames (see `encode_rollout`)."""

    ticket_id: Count
    actor: Name
    prompt_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
    samples: Annotated[tuple[SampleHeader, ...], Meta(min_length=1, max_length=MAX_SAMPLES)]
    seconds: Seconds = 0.0

    @property
    def oldest_version(self) -> int:
        """The oldest policy version among all tokens of the group; staleness counts from it."""
        return min((span.version for sample in self.samples for span in sample.spans), default=0)


class GroupScores(Struct, frozen=True, forbid_unknown_fields=True):
    """The scores of a group, one per sample in order."""

    ticket_id: Count
    rewarder: Name
    scores: Annotated[tuple[FinalScore, ...], Meta(min_length=1, max_length=MAX_SAMPLES)]
    seconds: Seconds = 0.0


class Rollout(Struct, frozen=True):
    """A generated group with its arrays; they are views into the received frames.

    Attributes:
        prompt_ids: int32 [P].
        token_ids: int32 [T], the responses of all samples one after the other.
        logprobs: float32 [T], natural-log probability of each token under the behaviour policy, with
            temperature and top-p applied.
    """

    header: RolloutHeader
    prompt_ids: NDArray[np.int32]
    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]


class ScoredGroup(Struct, frozen=True):
    """What the learner trains on: ticket, rollout and scores of one group."""

    ticket: Ticket
    rollout: Rollout
    scores: GroupScores


# --------------------------------------------------------------------------- control messages


class RunState(Struct, frozen=True, forbid_unknown_fields=True):
    """What the learner tells everybody: which weights are newest, and where they are served.

    `incarnation` changes whenever a learner starts; work and weights of an earlier one are void.
    """

    incarnation: Count
    version: Count
    weights_endpoint: Annotated[str, Meta(max_length=256)] = ""
    weights_key: Annotated[str, Meta(max_length=64)] = ""
    checksum: Annotated[str, Meta(max_length=128)] = ""
    finished: bool = False


class PeerStatus(Struct, frozen=True, forbid_unknown_fields=True):
    """What a role is doing: its phase, what it waits for, and its counters."""

    phase: Annotated[str, Meta(max_length=256)] = ""
    waits_for: Annotated[str, Meta(max_length=256)] = ""
    progress_age_s: Seconds = 0.0
    counters: Annotated[dict[Name, float], Meta(max_length=64)] = {}


class LeaseRef(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One item in one peer's hands. A lease number is never used twice by a broker."""

    stage: StageName
    item: Count
    lease: Count


class Hello(Struct, frozen=True, tag="hello", forbid_unknown_fields=True):
    """First message of a peer, and its answer to `Who`."""

    role: Role
    incarnation: Count = 0


class Serve(Struct, frozen=True, tag="serve", forbid_unknown_fields=True):
    """Credit: this peer holds up to `capacity` leases of `stage` at a time. 0: it drains."""

    stage: StageName
    capacity: Annotated[int, Meta(ge=0, le=1 << 20)]


class Heartbeat(Struct, frozen=True, tag="heartbeat", forbid_unknown_fields=True):
    """Renews the leases named. Leases up to the newest seen of their stage that are not named were lost by the
    peer and go to others; newer ones are still on their way."""

    held: Annotated[tuple[LeaseRef, ...], Meta(max_length=4096)]
    newest_seen: dict[StageName, Count]
    status: PeerStatus


class Submit(Struct, frozen=True, tag="submit", forbid_unknown_fields=True):
    """Tickets from the learner, one payload frame each (an encoded `Ticket`), in order."""

    tickets: Annotated[tuple[Count, ...], Meta(min_length=1, max_length=MAX_TICKETS)]


class Complete(Struct, frozen=True, tag="complete", forbid_unknown_fields=True):
    """The work of a lease is done; its result follows as payload."""

    lease: LeaseRef


class Release(Struct, frozen=True, tag="release", forbid_unknown_fields=True):
    """The work of a lease could not be done now; it may be tried again after `delay_s`."""

    lease: LeaseRef
    delay_s: Seconds
    reason: Annotated[str, Meta(max_length=1024)]


class Announce(Struct, frozen=True, tag="announce", forbid_unknown_fields=True):
    """The learner publishes a new `RunState`."""

    state: RunState


class SlotRequest(Struct, frozen=True, tag="slot_request", forbid_unknown_fields=True):
    """One request to the upstream wants a slot of the fleet's quota."""

    request: Count


class SlotReplied(Struct, frozen=True, tag="slot_replied", forbid_unknown_fields=True):
    """The upstream has answered the request that slot was granted for, or none was sent (`unused`).

    What else is known of the answer: see `common.quota.Reply`.
    """

    slot: Count
    grant: Count
    limit: Rate | None = None
    remaining: Rate | None = None
    sent_after_s: Seconds | None = None
    took_s: Seconds | None = None
    unused: bool = False


class SlotThrottled(Struct, frozen=True, tag="slot_throttled", forbid_unknown_fields=True):
    """The upstream asks to be left alone for so long; `refused`: it turned a request away for the quota."""

    retry_after_s: Annotated[float, Meta(ge=0, le=MAX_RETRY_AFTER_S)]
    refused: bool = True


class StatusRequest(Struct, frozen=True, tag="status_request", forbid_unknown_fields=True):
    """Asks for a `StatusReply`."""


class Bye(Struct, frozen=True, tag="bye", forbid_unknown_fields=True):
    """The peer leaves; its leases go to others at once."""


ToBroker = (
    Hello
    | Serve
    | Heartbeat
    | Submit
    | Complete
    | Release
    | Announce
    | SlotRequest
    | SlotReplied
    | SlotThrottled
    | StatusRequest
    | Bye
)


class Welcome(Struct, frozen=True, tag="welcome", forbid_unknown_fields=True):
    """Answer to `Hello`. A new `broker_epoch` means a new, empty broker: earlier leases are void."""

    broker_epoch: Count
    heartbeat_s: Seconds
    state: RunState | None


class Who(Struct, frozen=True, tag="who", forbid_unknown_fields=True):
    """The broker does not know this peer (it restarted, or gave it up): say `Hello` again."""


class Assign(Struct, frozen=True, tag="assign", forbid_unknown_fields=True):
    """Work for the peer: the payload depends on the stage (see `common.broker.service`)."""

    lease: LeaseRef


class Refused(Struct, frozen=True, tag="refused", forbid_unknown_fields=True):
    """These submitted tickets did not fit into the queue: submit them again later."""

    tickets: Annotated[tuple[Count, ...], Meta(max_length=MAX_TICKETS)]
    reason: str


class StateUpdate(Struct, frozen=True, tag="state", forbid_unknown_fields=True):
    """The newest `RunState`, sent to every peer when it changes."""

    state: RunState


class SlotGrant(Struct, frozen=True, tag="slot_grant", forbid_unknown_fields=True):
    """Slot `slot` may be used for request `request`, within `use_within_s` of the grant.

    `waited_s`: how long the request waited at the broker. The peer cannot see the broker's clock; that the grant is at
    most (now - when it asked - waited_s) old, it can.
    """

    request: Count
    slot: Count
    grant: Count
    use_within_s: Seconds
    waited_s: Seconds


class StageStatus(Struct, frozen=True, forbid_unknown_fields=True):
    """Sizes of one stage."""

    queued: Count
    leased: Count
    bytes: Count
    expired: Count
    late: Count


class PeerEntry(Struct, frozen=True, forbid_unknown_fields=True):
    """One peer as the broker sees it; `silent_s` is the time since its last message."""

    name: str
    role: Role
    leases: Count
    silent_s: Seconds
    status: PeerStatus


class StatusReply(Struct, frozen=True, tag="status", forbid_unknown_fields=True):
    """Everything the progress display and the learner's metrics need to know of the fleet."""

    stages: dict[StageName, StageStatus]
    peers: tuple[PeerEntry, ...]
    slots_in_use: Count
    slots_granted: Count
    rejected_frames: Count
    slots_refused: Count = 0
    quota_phase: str = ""
    quota_waits_for: str = ""


class Superseded(Struct, frozen=True, tag="superseded", forbid_unknown_fields=True):
    """Answer to the `Hello` of a learner older than the one that leads the run: it must end."""

    incarnation: Count


class Protest(Struct, frozen=True, tag="protest", forbid_unknown_fields=True):
    """A message of this peer could not be accepted; says why. For logs and debugging."""

    reason: str


FromBroker = Welcome | Who | Assign | Refused | StateUpdate | SlotGrant | StatusReply | Superseded | Protest

AnyToBroker = ToBroker | CacheToBroker  # everything a peer may send
AnyFromBroker = FromBroker | CacheFromBroker  # everything the broker may send

# --------------------------------------------------------------------------- encoding

_encoder = msgspec.msgpack.Encoder()
_decoders: dict[Any, msgspec.msgpack.Decoder[Any]] = {}
T = TypeVar("T")


def encode(message: Struct) -> bytes:
    """MessagePack of one struct."""
    return _encoder.encode(message)


def decode(frame: bytes | memoryview, kind: Any) -> Any:
    """Decode a frame as `kind` (a struct or a union of tagged structs).

    Raises:
        MessageError: not MessagePack, wrong type, out of bounds, unknown field.
    """
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.msgpack.Decoder(kind)
    try:
        return decoder.decode(frame)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        name = getattr(kind, "__name__", "message")
        raise MessageError(f"not a valid {name}: {error}") from None


def encode_rollout(rollout: Rollout) -> list[bytes | memoryview]:
    """Four frames: header, prompt ids, token ids, log-probabilities. The arrays are not copied."""
    import numpy as np

    arrays = (
        np.ascontiguousarray(rollout.prompt_ids, dtype="<i4"),
        np.ascontiguousarray(rollout.token_ids, dtype="<i4"),
        np.ascontiguousarray(rollout.logprobs, dtype="<f4"),
    )
    return [encode(rollout.header), *(array.data.cast("B") if array.size else b"" for array in arrays)]


def decode_rollout(frames: Payload) -> Rollout:
    """The inverse of `encode_rollout`; the arrays are views into the frames.

    Raises:
        MessageError: also where header and arrays contradict each other.
    """
    if len(frames) != 4:
        raise MessageError(f"a rollout has 4 frames, this one has {len(frames)}")
    header: RolloutHeader = decode(frames[0], RolloutHeader)
    total = sum(sample.tokens for sample in header.samples)
    _check_spans(header)
    return Rollout(
        header=header,
        prompt_ids=_array(frames[1], "<i4", header.prompt_tokens, "prompt ids"),
        token_ids=_array(frames[2], "<i4", total, "token ids"),
        logprobs=_array(frames[3], "<f4", total, "log-probabilities"),
    )


def encode_scored_group(group: ScoredGroup) -> list[bytes | memoryview]:
    """Six frames: ticket, rollout (4 frames), scores. The arrays are not copied."""
    return [encode(group.ticket), *encode_rollout(group.rollout), encode(group.scores)]


def decode_scored_group(frames: Payload) -> ScoredGroup:
    """Payload of the `train` stage: ticket, rollout (4 frames), scores.

    Raises:
        MessageError: also where the three do not belong together.
    """
    if len(frames) != 6:
        raise MessageError(f"a scored group has 6 frames, this one has {len(frames)}")
    ticket: Ticket = decode(frames[0], Ticket)
    rollout = decode_rollout(frames[1:5])
    scores: GroupScores = decode(frames[5], GroupScores)
    if not ticket.ticket_id == rollout.header.ticket_id == scores.ticket_id:
        raise MessageError("ticket, rollout and scores are of different tickets")
    if len(scores.scores) != len(rollout.header.samples):
        raise MessageError(f"{len(rollout.header.samples)} samples but {len(scores.scores)} scores")
    return ScoredGroup(ticket=ticket, rollout=rollout, scores=scores)


def _array(frame: bytes | memoryview, dtype: str, length: int, what: str) -> NDArray[Any]:
    import numpy as np

    view = memoryview(frame)
    if view.nbytes != 4 * length:
        raise MessageError(f"{what}: {view.nbytes} bytes, the header says {length} values of 4")
    return np.frombuffer(view, dtype=dtype)


def _check_spans(header: RolloutHeader) -> None:
    for index, sample in enumerate(header.samples):
        position = 0
        for span in sample.spans:
            if span.start != position or span.end <= span.start:
                raise MessageError(f"sample {index}: version spans do not cover its tokens one by one")
            position = span.end
        if position != sample.tokens:
            raise MessageError(f"sample {index}: version spans end at {position} of {sample.tokens} tokens")
