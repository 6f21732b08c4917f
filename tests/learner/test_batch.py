"""Rows of samples and the packed micro-batches made of them."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.attention import Document
from learner.batch import MicroBatch, Row, build_rows, micro_batches
from learner.samples import TrainSample
from tests.learner.sample_lists import sample, sample_lists


def test_a_packed_row_by_hand() -> None:
    shared = Row((sample([1, 2], [3, 4, 5], index=4), sample([1, 2], [6], index=2)))
    single = Row((sample([7, 8, 9, 10], [11, 12], index=7),))
    batch = MicroBatch.from_rows([shared, single])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 7, 8, 9, 10, 11]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4]]
    assert batch.layout.documents == (Document(2, (2, 0)), Document(4, (1,)))
    # Both responses of the first row are predicted first by the prompt's last token, at place 1.
    assert batch.predictors.tolist() == [1, 2, 3, 1, 7, 8]
    assert batch.targets.tolist() == [3, 4, 5, 6, 11, 12]
    assert batch.behaviour.tolist() == [-1, -2, -3, -1, -1, -2]
    assert batch.versions.tolist() == [5, 6, 7, 5, 5, 6]
    assert batch.lengths.tolist() == [3, 3, 3, 1, 2, 2]
    assert batch.sequences.tolist() == [0, 0, 0, 1, 2, 2]
    assert batch.indices.tolist() == [4, 2, 7]
    assert (batch.responses, batch.input_tokens, batch.tokens) == (3, 9, 6)
    assert {batch.targets.dtype, batch.versions.dtype, batch.indices.dtype} == {torch.int64}
    assert {batch.behaviour.dtype, batch.lengths.dtype} == {torch.float32}


def test_positions_of_every_response_continue_from_the_prompt() -> None:
    batch = MicroBatch.from_rows([Row((sample([1, 2], [3, 4, 5]), sample([1, 2], [6, 7, 8])))])
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 3]]


@given(sample_lists(), st.integers(1, 60), st.booleans())
def test_every_response_is_laid_out_whole_and_once(samples: list[TrainSample], budget: int, share: bool) -> None:
    batches = micro_batches(build_rows(samples, budget, share), budget)
    assert sorted(index for batch in batches for index in batch.indices.tolist()) == list(range(len(samples)))
    for batch in batches:
        assert batch.input_ids.shape == batch.position_ids.shape == (1, batch.layout.tokens)
        assert batch.layout.tokens <= budget or len(batch.layout.documents) == batch.responses == 1
        for place, index in enumerate(batch.indices.tolist()):
            tokens = batch.sequences == place
            assert batch.targets[tokens].tolist() == samples[index].response_ids.tolist()
            # What predicts a token is the token before it, at the position before its own.
            before = batch.predictors[tokens]
            told = [*samples[index].prompt_ids.tolist(), *samples[index].response_ids.tolist()]
            start = len(samples[index].prompt_ids) - 1
            assert batch.input_ids[0, before].tolist() == told[start:-1]
            assert batch.position_ids[0, before].tolist() == list(range(start, len(told) - 1))


@given(sample_lists(), st.integers(1, 60))
def test_few_micro_batches_and_always_the_same(samples: list[TrainSample], budget: int) -> None:
    rows = build_rows(samples, budget)
    batches = micro_batches(rows, budget)
    assert [batch.indices.tolist() for batch in batches] == [
        batch.indices.tolist() for batch in micro_batches(rows, budget)
    ]
    # Any two could not have been one, so all but one are more than half full.
    sizes = sorted(batch.input_tokens for batch in batches)
    assert len(sizes) < 2 or sizes[0] + sizes[1] > budget


def test_sharing_respects_the_budget() -> None:
    samples = [sample([1, 2, 3], [4, 5, 6]) for _ in range(5)]
    rows = build_rows(samples, max_tokens=7)
    assert [len(row.samples) for row in rows] == [2, 2, 1]
    assert [row.length for row in rows] == [7, 7, 5]
    assert len(build_rows(samples, max_tokens=7, share_prompts=False)) == 5


def test_a_placeholder_counts_for_nothing() -> None:
    placeholder = MicroBatch.placeholder()
    assert (placeholder.tokens, placeholder.responses, placeholder.input_tokens) == (0, 0, 0)
    assert placeholder.to(torch.device("cpu")).input_ids.shape == (1, 1)
