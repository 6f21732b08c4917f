"""The wire form of samples, and which ones are refused."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given

from learner.samples import TrainSample, check_sample, decode_samples, encode_samples
from tests.learner.sample_lists import sample, sample_lists


@given(sample_lists())
def test_samples_survive_the_wire(samples: list[TrainSample]) -> None:
    decoded = decode_samples(encode_samples(samples))
    for before, after in zip(samples, decoded, strict=True):
        for name in ("prompt_ids", "response_ids", "behaviour_logprobs", "versions"):
            np.testing.assert_array_equal(getattr(before, name), getattr(after, name))
            assert getattr(before, name).dtype == getattr(after, name).dtype
        for name in ("reward", "group", "index"):
            assert getattr(before, name) == getattr(after, name)


def test_no_samples_survive_the_wire_and_garbage_does_not() -> None:
    assert decode_samples(encode_samples([])) == []
    with pytest.raises(msgspec.MsgspecError):
        decode_samples(b"\x93\x01\x02\x03")


GOOD = sample([1, 2], [3, 4])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (replace(GOOD, response_ids=GOOD.response_ids[:0]), "at least one token"),
        (replace(GOOD, behaviour_logprobs=GOOD.behaviour_logprobs[:1]), "2 response tokens, 1 behaviour"),
        (replace(GOOD, versions=GOOD.versions[:1]), "2 response tokens, 1 policy versions"),
        (replace(GOOD, prompt_ids=np.array([1, 50], dtype=np.int32)), "outside the vocabulary"),
        (replace(GOOD, response_ids=np.array([1, -1], dtype=np.int32)), "outside the vocabulary"),
        (replace(GOOD, behaviour_logprobs=np.array([0, np.nan], dtype=np.float32)), "finite"),
        (replace(GOOD, behaviour_logprobs=np.array([0, 0.1], dtype=np.float32)), "at most 0"),
    ],
)
def test_impossible_samples_are_refused(bad: TrainSample, message: str) -> None:
    check_sample(GOOD, vocab_size=50)
    with pytest.raises(ValueError, match=message):
        check_sample(bad, vocab_size=50)
