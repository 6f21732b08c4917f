"""Group-relative advantages against values worked out by hand and against their defining properties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.advantages import ADVANTAGES, grpo, grpo_no_std, rloo

REWARDS = torch.tensor([1.0, 3.0, 5.0, 5.0, 0.0], dtype=torch.float64)
# Group 9 holds 1, 3, 5 (mean 3, population variance 8/3); group 2 holds 5, 0 (mean 2.5, std 2.5).
GROUPS = torch.tensor([9, 9, 2, 9, 2])


def test_grpo_by_hand() -> None:
    expected = torch.tensor([-1.5, 0.0, 1.0, 1.5, -1.0], dtype=torch.float64)
    expected[[0, 3]] = torch.tensor([-2.0, 2.0], dtype=torch.float64) / (8 / 3) ** 0.5
    torch.testing.assert_close(grpo(REWARDS, GROUPS), expected, atol=1e-5, rtol=0)


def test_grpo_without_std_by_hand() -> None:
    expected = torch.tensor([-2.0, 0.0, 2.5, 2.0, -2.5], dtype=torch.float64)
    torch.testing.assert_close(grpo_no_std(REWARDS, GROUPS), expected)


def test_rloo_subtracts_the_mean_of_the_others() -> None:
    expected = torch.tensor([1 - 4.0, 3 - 3.0, 5 - 0.0, 5 - 2.0, 0 - 5.0], dtype=torch.float64)
    torch.testing.assert_close(rloo(REWARDS, GROUPS), expected)


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
def test_equal_rewards_and_groups_of_one_give_zero(name: str) -> None:
    rewards = torch.tensor([0.7, 0.7, 0.7, 123.0], dtype=torch.float64)
    advantages = ADVANTAGES[name](rewards, torch.tensor([0, 0, 0, 1]))
    torch.testing.assert_close(advantages, torch.zeros(4, dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
@given(
    rewards=st.lists(st.tuples(st.floats(-10, 10), st.integers(-3, 3)), min_size=1, max_size=30),
    data=st.data(),
)
def test_sum_to_zero_and_ignore_order(name: str, rewards: list[tuple[float, int]], data: st.DataObject) -> None:
    values = torch.tensor([reward for reward, _ in rewards], dtype=torch.float64)
    groups = torch.tensor([group for _, group in rewards])
    advantages = ADVANTAGES[name](values, groups)
    for group in groups.unique():
        assert abs(float(advantages[groups == group].sum())) < 1e-6
    order = torch.tensor(data.draw(st.permutations(range(len(rewards)))))
    torch.testing.assert_close(ADVANTAGES[name](values[order], groups[order]), advantages[order])


@given(scale=st.floats(0.1, 100), shift=st.floats(-100, 100))
def test_grpo_ignores_the_scale_of_rewards(scale: float, shift: float) -> None:
    np.testing.assert_allclose(grpo(REWARDS * scale + shift, GROUPS), grpo(REWARDS, GROUPS), atol=1e-4)


@pytest.mark.parametrize(
    ("rewards", "groups", "message"),
    [
        ([1.0, float("nan")], [0, 0], "not finite"),
        ([1.0, 2.0], [0], "one length"),
        ([], [], "non-empty"),
    ],
)
def test_bad_input_is_refused(rewards: list[float], groups: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grpo(torch.tensor(rewards), torch.tensor(groups, dtype=torch.int64))
