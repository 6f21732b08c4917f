"""What samples cost, and cuts of a batch into parts of about equal cost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen2Config

from learner.balance import CostModel, partition, shuffle_groups
from learner.samples import TrainSample
from tests.learner.sample_lists import sample, sample_lists


def cost_of(samples: list[TrainSample], cost: CostModel) -> float:
    """Every response, and a prompt per run of equal prompts (per response without sharing)."""
    total, last = 0.0, None
    for one in samples:
        prompt = one.prompt_ids.tobytes()
        if prompt != last or not cost.share_prompts:
            total += cost.prompt(len(one.prompt_ids))
        total += cost.response(len(one.prompt_ids), len(one.response_ids))
        last = prompt
    return total


def group(prompt: int, responses: list[int], number: int) -> list[TrainSample]:
    return [sample([number] * prompt, [1] * length, number) for length in responses]


def test_the_cost_of_a_sample_by_hand() -> None:
    cost = CostModel(pair_cost=0.5)
    assert cost.prompt(3) == 3 + 0.5 * (1 + 2 + 3)
    # Three tokens, of which the first two are inputs; they see 4 + 1 and 4 + 2 tokens.
    assert cost.response(prompt=4, length=3) == 2 + 0.5 * (5 + 6)
    assert cost.response(prompt=4, length=1) == 0
    assert CostModel.of_model(Qwen2Config(hidden_size=64)).pair_cost == 1 / 384


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("pair_cost", [0.0, 0.1, 2.0])
@given(samples=sample_lists(longest=20), parts=st.integers(1, 8))
def test_partition_keeps_order_and_balances(
    samples: list[TrainSample], parts: int, pair_cost: float, share: bool
) -> None:
    cost = CostModel(pair_cost, share)
    cut = partition(samples, parts, cost)
    assert len(cut) == parts
    assert [id(one) for part in cut for one in part] == [id(one) for one in samples]
    fair = cost_of(samples, cost) / parts
    heaviest = max(cost_of([one], cost) for one in samples)
    assert all(cost_of(part, cost) <= fair + 2.5 * heaviest + 1e-9 for part in cut)
    assert len(samples) < parts or all(cut)


def test_long_samples_count_for_more_than_their_tokens() -> None:
    samples = group(1, [11] * 12, 1) + group(1, [101], 2)
    by_tokens = partition(samples, 2, CostModel(share_prompts=False))
    by_cost = partition(samples, 2, CostModel(pair_cost=1.0, share_prompts=False))
    assert [len(part) for part in by_tokens] == [11, 2]
    assert [len(part) for part in by_cost] == [12, 1]


def test_a_cut_moves_to_the_edge_of_a_group_if_the_prompt_costs_more() -> None:
    long_prompt = group(50, [11, 11, 11], 1) + group(50, [11, 11], 2)
    assert [len(part) for part in partition(long_prompt, 2, CostModel())] == [3, 2]
    # Without a prompt worth sharing the parts are as even as whole samples allow.
    short_prompt = group(1, [11] * 5, 1) + group(1, [11], 2)
    assert [len(part) for part in partition(short_prompt, 2, CostModel())] == [3, 3]


def test_no_part_is_empty_where_there_are_enough_samples() -> None:
    samples = group(1, [1000], 1) + group(1, [2], 2) + group(1, [2], 3)
    assert [len(part) for part in partition(samples, 3)] == [1, 1, 1]
    assert [len(part) for part in partition(samples[::-1], 3)] == [1, 1, 1]
    assert sum(map(len, partition(samples, 5))) == 3
    assert partition([], 2) == [[], []]


def test_shuffle_moves_whole_groups_and_follows_the_seed() -> None:
    samples = [sample([1], [2], number) for number in range(20) for _ in range(3)]
    first, again, other = (shuffle_groups(samples, (0, step)) for step in (1, 1, 2))
    order = [one.group for one in first]
    assert order == [one.group for one in again]
    assert order != [one.group for one in other]
    assert sorted(order) == [one.group for one in samples]
    assert all(order[i] == order[i + 1] == order[i + 2] for i in range(0, 60, 3))
