from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.scores import InvalidOutput, Score, Scored, Unavailable

finite = st.floats(allow_nan=False, allow_infinity=False)
words = st.text(st.characters(blacklist_categories=["Cs"]))
metrics = st.dictionaries(words, finite, max_size=4)
scores = st.one_of(
    st.builds(Scored, reward=finite, metrics=metrics, query=words, results=st.integers(0, 2**40)),
    st.builds(InvalidOutput, reward=finite, reason=words, metrics=metrics, query=words, detail=words),
    st.builds(Unavailable, reason=words, retry_after_s=st.none() | st.floats(0, 1e6)),
)


@given(st.lists(scores))
def test_scores_survive_the_wire(batch: list[Score]) -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(batch), type=list[Score]) == batch


def test_unavailable_has_no_reward_to_train_on() -> None:
    assert not hasattr(Unavailable("down"), "reward")
    with pytest.raises(TypeError):
        Unavailable(reason="down", reward=0.0)  # type: ignore[call-arg]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number_is_refused_on_receipt_too(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        Scored(reward=bad, metrics={}, query="a", results=0)
    with pytest.raises(ValueError, match="finite"):
        InvalidOutput(reward=0.0, reason="x", metrics={"recall": bad})
    wire = msgspec.msgpack.encode({"kind": "invalid", "reward": bad, "reason": "x"})
    with pytest.raises(msgspec.ValidationError, match="finite"):
        msgspec.msgpack.decode(wire, type=Score)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_a_wait_must_be_a_number_of_seconds(bad: float) -> None:
    with pytest.raises(ValueError, match="retry_after_s"):
        Unavailable("down", retry_after_s=bad)


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(msgspec.ValidationError, match="kind"):
        msgspec.msgpack.decode(msgspec.msgpack.encode({"kind": "zero", "reward": 0.0}), type=Score)
