"""Wire messages: what goes in comes out, arrays without copies, and nothing malformed gets past decoding."""

from __future__ import annotations

import msgpack
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import messages as m
from common.scores import InvalidOutput, Scored, Unavailable


@st.composite
def rollouts(draw: st.DrawFn) -> m.Rollout:
    counts = draw(st.lists(st.integers(0, 30), min_size=1, max_size=5))
    samples = tuple(
        m.SampleHeader(draw(st.text(max_size=20)), count, draw(st.sampled_from(["stop", "length"])), spans(draw, count))
        for count in counts
    )
    prompt = draw(st.integers(1, 20))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    return m.Rollout(
        m.RolloutHeader(draw(st.integers(0, 1 << 53)), "actor-1", prompt, samples, 0.5),
        rng.integers(0, 9999, prompt).astype(np.int32),
        rng.integers(0, 9999, sum(counts)).astype(np.int32),
        rng.normal(size=sum(counts)).astype(np.float32),
    )


def spans(draw: st.DrawFn, tokens: int) -> tuple[m.WeightSpan, ...]:
    if tokens == 0:
        return ()
    cuts = sorted(draw(st.sets(st.integers(1, tokens), max_size=3)) | {tokens})
    starts = [0, *cuts[:-1]]
    return tuple(m.WeightSpan(7 + i, start, end) for i, (start, end) in enumerate(zip(starts, cuts, strict=True)))


@given(rollouts())
def test_rollouts_survive_the_wire_without_copies(rollout: m.Rollout) -> None:
    frames = [bytes(frame) for frame in m.encode_rollout(rollout)]
    decoded = m.decode_rollout(frames)
    assert decoded.header == rollout.header
    for name in ("prompt_ids", "token_ids", "logprobs"):
        sent, received = getattr(rollout, name), getattr(decoded, name)
        np.testing.assert_array_equal(sent, received)
        assert received.dtype == sent.dtype
    assert decoded.prompt_ids.base is not None, "a view into the frame"


@given(rollouts(), st.data())
def test_a_garbled_rollout_is_refused_or_equal(rollout: m.Rollout, data: st.DataObject) -> None:
    frames = [bytearray(frame) for frame in m.encode_rollout(rollout)]
    index = data.draw(st.integers(0, 3))
    cut = data.draw(st.integers(0, max(0, len(frames[index]) - 1)))
    if cut == len(frames[index]):
        return
    with pytest.raises(m.MessageError):
        m.decode_rollout([bytes(frame[:cut] if i == index else frame) for i, frame in enumerate(frames)])


@given(st.binary(max_size=200))
def test_random_bytes_never_get_past_decoding(frame: bytes) -> None:
    for kind in (m.AnyToBroker, m.AnyFromBroker, m.Ticket, m.RolloutHeader, m.GroupScores):
        with pytest.raises(m.MessageError, match="not a valid"):
            m.decode(frame, kind)


@pytest.mark.parametrize(
    "changed",
    [
        {"ticket_id": -1},
        {"kind": "test"},
        {"messages": []},
        {"sampling": {"samples": 0, "temperature": 1.0, "top_p": 1.0, "max_tokens": 1}},
        {"sampling": {"samples": 10**9, "temperature": 1.0, "top_p": 1.0, "max_tokens": 1}},
        {"surprise": 1},
        {"prompt_id": "x" * 1000},
    ],
)
def test_ticket_bounds(changed: dict[str, object]) -> None:
    ticket = {
        "ticket_id": 1,
        "kind": "train",
        "prompt_id": "q",
        "epoch": 0,
        "messages": [{"role": "user", "content": "x"}],
        "reference": {},
        "sampling": {"samples": 2, "temperature": 1.0, "top_p": 1.0, "max_tokens": 4},
        "min_version": 0,
    }
    assert m.decode(msgspec.msgpack.encode(ticket), m.Ticket).ticket_id == 1
    with pytest.raises(m.MessageError):
        m.decode(msgspec.msgpack.encode(ticket | changed), m.Ticket)


def test_version_spans_must_cover_every_token() -> None:
    for bad in [(m.WeightSpan(1, 0, 2),), (m.WeightSpan(1, 1, 3),), (m.WeightSpan(1, 0, 2), m.WeightSpan(2, 1, 3))]:
        header = m.RolloutHeader(1, "a", 1, (m.SampleHeader("", 3, "stop", bad),))
        frames = [m.encode(header), b"\0" * 4, b"\0" * 12, b"\0" * 12]
        with pytest.raises(m.MessageError, match="version spans"):
            m.decode_rollout(frames)


def test_the_oldest_version_is_that_of_the_oldest_token() -> None:
    young = m.SampleHeader("", 1, "stop", (m.WeightSpan(9, 0, 1),))
    mixed = m.SampleHeader("", 3, "stop", (m.WeightSpan(4, 0, 1), m.WeightSpan(9, 1, 3)))
    assert m.RolloutHeader(1, "a", 1, (young, mixed)).oldest_version == 4


def test_an_outage_cannot_be_sent_as_a_score() -> None:
    good = m.GroupScores(1, "r", (Scored(1.0, {}, "q", 2), InvalidOutput(-4.0, "missing_tag")))
    assert m.decode(m.encode(good), m.GroupScores) == good
    smuggled = msgspec.msgpack.encode(
        {"ticket_id": 1, "rewarder": "r", "scores": [msgspec.to_builtins(Unavailable("down"))], "seconds": 0.0}
    )
    with pytest.raises(m.MessageError):
        m.decode(smuggled, m.GroupScores)


def test_a_scored_group_must_belong_together() -> None:
    sample = m.SampleHeader("t", 1, "stop", (m.WeightSpan(0, 0, 1),))
    rollout = m.Rollout(
        m.RolloutHeader(5, "a", 1, (sample,)), np.zeros(1, np.int32), np.zeros(1, np.int32), np.zeros(1, np.float32)
    )
    ticket = m.Ticket(5, "train", "q", 0, (m.ChatMessage("user", "x"),), {}, m.Sampling(1, 1.0, 1.0, 1), 0)
    scores = m.GroupScores(5, "r", (Scored(1.0, {}, "q", 1),))
    frames = [m.encode(ticket), *m.encode_rollout(rollout), m.encode(scores)]
    assert m.decode_scored_group(frames).scores == scores
    other = m.GroupScores(6, "r", scores.scores)
    with pytest.raises(m.MessageError, match="different tickets"):
        m.decode_scored_group([*frames[:-1], m.encode(other)])
    more = m.GroupScores(5, "r", scores.scores * 2)
    with pytest.raises(m.MessageError, match="1 samples but 2 scores"):
        m.decode_scored_group([*frames[:-1], m.encode(more)])


def test_frames_are_plain_messagepack_for_peers_in_other_languages() -> None:
    lease = m.LeaseRef("score", 7, 3)
    decoded = msgpack.unpackb(m.encode(m.Release(lease, 1.5, "down")))
    assert decoded == {"type": "release", "lease": ["score", 7, 3], "delay_s": 1.5, "reason": "down"}
    assert m.decode(msgpack.packb(decoded), m.AnyToBroker) == m.Release(lease, 1.5, "down")
