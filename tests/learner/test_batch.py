"""Layout of micro-batches, spread over ranks, and the wire form of samples."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.batch import (
    MicroBatch,
    Row,
    TrainSample,
    build_rows,
    check_sample,
    decode_samples,
    encode_samples,
    micro_batches,
    partition,
    shuffle_groups,
)


def sample(prompt: list[int], response: list[int], group: int = 0, advantage: float = 0.0) -> TrainSample:
    return TrainSample(
        np.array(prompt, dtype=np.int32),
        np.array(response, dtype=np.int32),
        np.full(len(response), -1.0, dtype=np.float32),
        0.5,
        group,
        3,
        advantage,
    )


@st.composite
def sample_lists(draw: st.DrawFn) -> list[TrainSample]:
    """Up to 6 groups of up to 4 samples; tokens are drawn from 50 ids."""
    ids = st.lists(st.integers(0, 49), min_size=1, max_size=8)
    samples: list[TrainSample] = []
    for group in range(draw(st.integers(1, 6))):
        prompt = draw(ids)
        samples += [sample(prompt, draw(ids), group) for _ in range(draw(st.integers(1, 4)))]
    return samples


def test_a_shared_row_by_hand() -> None:
    row = Row((sample([1, 2], [3, 4, 5], advantage=1.0), sample([1, 2], [6], advantage=-2.0)))
    long = Row((sample([7, 8, 9, 10], [11, 12]),))
    batch = MicroBatch.from_rows([row, long])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 0], [7, 8, 9, 10, 11]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert batch.segments.tolist() == [[0, 0, 1, 1, -1], [0, 0, 0, 0, 1]]
    # Both responses of the first row are predicted first by the prompt's last token, at index 1.
    assert batch.predictors.tolist() == [1, 2, 3, 1, 8, 9]
    assert batch.targets.tolist() == [3, 4, 5, 6, 11, 12]
    assert batch.advantages.tolist() == [1.0, 1.0, 1.0, -2.0, 0.0, 0.0]
    assert batch.lengths.tolist() == [3, 3, 3, 1, 2, 2]
    assert (batch.responses, batch.input_tokens, batch.tokens) == (3, 9, 6)


def test_positions_of_every_response_continue_from_the_prompt() -> None:
    batch = MicroBatch.from_rows([Row((sample([1, 2], [3, 4, 5]), sample([1, 2], [6, 7, 8])))])
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 3]]


@given(sample_lists())
def test_the_mask_shows_a_token_its_own_past_and_nothing_else(samples: list[TrainSample]) -> None:
    for batch in micro_batches(build_rows(samples, 40), 60):
        mask = batch.attention_mask()
        if mask is None:
            assert int(batch.segments.max()) <= 1
            continue
        for row, allowed in enumerate(mask[:, 0]):
            segments = batch.segments[row].tolist()
            for query, own in enumerate(segments):
                visible = {key for key in range(len(segments)) if allowed[query, key]}
                assert query in visible
                if own != -1:
                    expected = {k for k in range(query + 1) if segments[k] in (0, own)}
                    assert visible == expected


@given(sample_lists(), st.integers(1, 60), st.integers(1, 60), st.booleans())
def test_every_token_is_laid_out_exactly_once(
    samples: list[TrainSample], row_tokens: int, budget: int, share: bool
) -> None:
    batches = micro_batches(build_rows(samples, row_tokens, share), budget)
    laid_out = sorted(token for batch in batches for token in batch.targets.tolist())
    assert laid_out == sorted(token for one in samples for token in one.response_ids.tolist())
    assert sum(batch.responses for batch in batches) == len(samples)
    for batch in batches:
        rows, width = batch.input_ids.shape
        assert rows == 1 or rows * width <= budget
        assert batch.shared or batch.attention_mask() is None


def test_sharing_respects_the_row_limit() -> None:
    samples = [sample([1, 2, 3], [4, 5, 6]) for _ in range(5)]
    rows = build_rows(samples, max_row_tokens=7)
    assert [len(row.samples) for row in rows] == [2, 2, 1]
    assert [row.length for row in rows] == [7, 7, 5]
    assert len(build_rows(samples, max_row_tokens=7, share_prompts=False)) == 5


@given(sample_lists(), st.integers(1, 8))
def test_partition_keeps_order_and_balances(samples: list[TrainSample], parts: int) -> None:
    cut = partition(samples, parts)
    assert len(cut) == parts
    assert [id(one) for part in cut for one in part] == [id(one) for one in samples]
    fair = sum(one.tokens for one in samples) / parts
    heaviest = max(one.tokens for one in samples)
    assert all(abs(sum(one.tokens for one in part) - fair) <= heaviest for part in cut)


def test_shuffle_moves_whole_groups_and_follows_the_seed() -> None:
    samples = [sample([1], [2], group) for group in range(20) for _ in range(3)]
    first, again, other = (shuffle_groups(samples, (0, step)) for step in (1, 1, 2))
    order = [one.group for one in first]
    assert order == [one.group for one in again]
    assert order != [one.group for one in other]
    assert sorted(order) == [one.group for one in samples]
    assert all(order[i] == order[i + 1] == order[i + 2] for i in range(0, 60, 3))


@given(sample_lists())
def test_samples_survive_the_wire(samples: list[TrainSample]) -> None:
    decoded = decode_samples(encode_samples(samples))
    for before, after in zip(samples, decoded, strict=True):
        for name in ("prompt_ids", "response_ids", "behaviour_logprobs"):
            np.testing.assert_array_equal(getattr(before, name), getattr(after, name))
            assert getattr(before, name).dtype == getattr(after, name).dtype
        assert (before.reward, before.group, before.oldest_version) == (0.5, after.group, 3)
        assert after.advantage == before.advantage


def test_no_samples_survive_the_wire_and_garbage_does_not() -> None:
    assert decode_samples(encode_samples([])) == []
    with pytest.raises(msgspec.MsgspecError):
        decode_samples(b"\x93\x01\x02\x03")


def test_a_placeholder_counts_for_nothing() -> None:
    placeholder = MicroBatch.placeholder()
    assert (placeholder.tokens, placeholder.responses, placeholder.input_tokens) == (0, 0, 0)
    assert placeholder.to(torch.device("cpu")).input_ids.shape == (1, 1)


GOOD = sample([1, 2], [3, 4])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (replace(GOOD, response_ids=GOOD.response_ids[:0]), "at least one token"),
        (replace(GOOD, behaviour_logprobs=GOOD.behaviour_logprobs[:1]), "2 response tokens"),
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
