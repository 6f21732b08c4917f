"""Advantages against the reference formulas, against values worked out by hand and their defining properties."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.advantages import ADVANTAGES, GROUP_RELATIVE, NEEDS_CRITIC, AdvantageSettings, StepRewards
from tests.learner import reference_formulas as reference

DISCOUNTED = AdvantageSettings(gamma=0.9, gae_lambda=0.8)
UNDISCOUNTED = AdvantageSettings()


def make_step(seed: int, groups: int = 4, longest: int = 9) -> StepRewards:
    """A random step with groups of 1 to 5 responses, shuffled, a reward on every token and a critic."""
    rng = np.random.default_rng(seed)
    ids = rng.permutation(np.repeat(rng.permutation(100)[:groups], rng.integers(1, 6, groups)))
    lengths = rng.integers(1, longest + 1, len(ids))
    tokens = int(lengths.sum())
    return StepRewards(
        rewards=torch.from_numpy(rng.normal(size=tokens)),
        sequences=torch.from_numpy(np.repeat(np.arange(len(ids)), lengths)),
        groups=torch.from_numpy(ids),
        values=torch.from_numpy(rng.normal(size=tokens)),
    )


def outcome_step(rewards: list[float], groups: list[int]) -> StepRewards:
    """Responses of 1, 2, 3, .. tokens with the reward on the last one, as a task gives it."""
    lengths = torch.arange(1, len(rewards) + 1)
    stream = torch.zeros(int(lengths.sum()), dtype=torch.float64)
    stream[lengths.cumsum(0) - 1] = torch.tensor(rewards, dtype=torch.float64)
    sequences = torch.arange(len(rewards)).repeat_interleave(lengths)
    return StepRewards(stream, sequences, torch.tensor(groups))


def advantages_of(name: str, step: StepRewards, settings: AdvantageSettings = UNDISCOUNTED) -> torch.Tensor:
    return ADVANTAGES[name](step, settings).advantages


def per_response(name: str, step: StepRewards) -> list[float]:
    """The advantage of each response; fails if its tokens differ."""
    advantages = advantages_of(name, step)
    parts = [advantages[step.sequences == index] for index in range(len(step.groups))]
    for part in parts:
        assert bool((part == part[0]).all())
    return [float(part[0]) for part in parts]


@pytest.mark.parametrize("settings", [UNDISCOUNTED, DISCOUNTED, replace(DISCOUNTED, critic_lambda=1.0)])
@given(seed=st.integers(0, 2**32 - 1))
def test_token_level_estimators_match_the_reference(settings: AdvantageSettings, seed: int) -> None:
    step = make_step(seed)
    assert step.values is not None
    rewards, sequences = step.rewards.numpy(), step.sequences.numpy()
    result = ADVANTAGES["gae"](step, settings)
    assert result.returns is not None
    expected, returns = reference.gae(
        rewards, step.values.numpy(), sequences, settings.gamma, settings.gae_lambda, settings.critic_lambda
    )
    np.testing.assert_allclose(result.returns.numpy(), returns, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(result.advantages.numpy(), expected, rtol=1e-6, atol=1e-9)
    to_go = reference.whiten(reference.rewards_to_go(rewards, sequences, settings.gamma))
    actual = advantages_of("reinforce_plus_plus", step, settings)
    np.testing.assert_allclose(actual.numpy(), to_go, rtol=1e-6, atol=1e-9)


@given(seed=st.integers(0, 2**32 - 1))
def test_gae_whitened_per_group_matches_the_reference(seed: int) -> None:
    step = make_step(seed)
    assert step.values is not None
    rewards, values, sequences = step.rewards.numpy(), step.values.numpy(), step.sequences.numpy()
    raw = reference.raw_gae(rewards, values, sequences, DISCOUNTED.gamma, DISCOUNTED.gae_lambda)
    result = ADVANTAGES["gae"](step, replace(DISCOUNTED, whitening="group"))
    expected = reference.whitened_per_group(raw, sequences, step.groups.numpy())
    np.testing.assert_allclose(result.advantages.numpy(), expected, rtol=1e-6, atol=1e-8)
    whole_step = ADVANTAGES["gae"](step, DISCOUNTED)
    assert result.returns is not None
    assert whole_step.returns is not None
    assert torch.equal(result.returns, whole_step.returns)


@given(seed=st.integers(0, 2**32 - 1))
def test_gae_whitened_per_group_is_grpo_where_the_critic_says_the_same_everywhere(seed: int) -> None:
    step = outcome_step(np.random.default_rng(seed).integers(0, 4, 12).tolist(), [0, 0, 7, 7, 7, 3, 3, 3, 0, 7, 3, 3])
    step = replace(step, values=torch.full_like(step.rewards, 2.5))
    whitened = advantages_of("gae", step, AdvantageSettings(whitening="group"))
    torch.testing.assert_close(whitened, advantages_of("grpo", step), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", sorted(GROUP_RELATIVE))
@given(seed=st.integers(0, 2**32 - 1))
def test_group_relative_estimators_match_the_reference(name: str, seed: int) -> None:
    step = make_step(seed)
    expected = reference.group_relative(name, step.rewards.numpy(), step.sequences.numpy(), step.groups.numpy())
    result = ADVANTAGES[name](step, DISCOUNTED)
    np.testing.assert_allclose(result.advantages.numpy(), expected, rtol=1e-6, atol=1e-9)
    assert result.returns is None


# Group 9 holds 1, 3, 5 (mean 3, population variance 8/3); group 2 holds 5, 0 (mean 2.5, std 2.5).
BY_HAND = outcome_step([1.0, 3.0, 5.0, 5.0, 0.0], [9, 9, 2, 9, 2])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("grpo", [-2 / (8 / 3) ** 0.5, 0.0, 1.0, 2 / (8 / 3) ** 0.5, -1.0]),
        ("dr_grpo", [-2.0, 0.0, 2.5, 2.0, -2.5]),
        ("rloo", [1 - 4.0, 3 - 3.0, 5 - 0.0, 5 - 2.0, 0 - 5.0]),
        # Population variance of the five centred rewards: (4 + 0 + 6.25 + 4 + 6.25) / 5 = 4.1.
        ("reinforce_plus_plus_baseline", [value / 4.1**0.5 for value in (-2.0, 0.0, 2.5, 2.0, -2.5)]),
    ],
)
def test_group_relative_by_hand(name: str, expected: list[float]) -> None:
    assert per_response(name, BY_HAND) == pytest.approx(expected, abs=1e-5)


def test_gae_by_hand() -> None:
    # One response of two tokens, reward 1 at its end, then one of a single token without reward.
    step = StepRewards(
        rewards=torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64),
        sequences=torch.tensor([0, 0, 1]),
        groups=torch.tensor([0, 1]),
        values=torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64),
    )
    result = ADVANTAGES["gae"](step, AdvantageSettings(gamma=0.5, gae_lambda=0.5))
    # delta = [0.5 x 0.25 - 0.5, 1 - 0.25, -0.75]; A = [-0.375 + 0.25 x 0.75, 0.75, -0.75]; R = A + V.
    assert result.returns is not None
    assert result.returns.tolist() == [-0.1875 + 0.5, 1.0, 0.0]
    # Mean of A -0.0625; deviations -0.125, 0.8125, -0.6875.
    spread = ((0.125**2 + 0.8125**2 + 0.6875**2) / 3) ** 0.5
    assert result.advantages.tolist() == pytest.approx([-0.125 / spread, 0.8125 / spread, -0.6875 / spread], 1e-5)


def test_undiscounted_gae_returns_are_the_rewards_to_come() -> None:
    """With gamma = lambda = 1, as the original trains, the critic learns the plain sum of what follows."""
    step = make_step(7)
    returns = ADVANTAGES["gae"](step, UNDISCOUNTED).returns
    assert returns is not None
    expected = reference.rewards_to_go(step.rewards.numpy(), step.sequences.numpy(), 1.0)
    np.testing.assert_allclose(returns.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("name", sorted(GROUP_RELATIVE))
@given(seed=st.integers(0, 2**32 - 1), reward=st.floats(-10, 10), size=st.integers(1, 5))
def test_a_group_with_equal_rewards_learns_nothing(name: str, seed: int, reward: float, size: int) -> None:
    rng = np.random.default_rng(seed)
    others = rng.normal(size=4).tolist()
    step = outcome_step([*others, *[reward] * size], [0, 1, 0, 1, *[2] * size])
    assert per_response(name, step)[4:] == pytest.approx([0.0] * size, abs=1e-6)


@pytest.mark.parametrize("name", sorted(GROUP_RELATIVE))
@given(seed=st.integers(0, 2**32 - 1))
def test_the_advantages_of_a_group_sum_to_zero(name: str, seed: int) -> None:
    step = make_step(seed)
    advantages = torch.tensor(per_response(name, step))
    for group in step.groups.unique():
        assert abs(float(advantages[step.groups == group].sum())) < 1e-5


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
@given(seed=st.integers(0, 2**32 - 1))
def test_the_order_of_responses_does_not_matter(name: str, seed: int) -> None:
    step = make_step(seed)
    assert step.values is not None
    order = np.random.default_rng(seed).permutation(len(step.groups))
    tokens = torch.cat([torch.nonzero(step.sequences == int(index))[:, 0] for index in order])
    lengths = torch.bincount(step.sequences)[torch.from_numpy(order)]
    shuffled = StepRewards(
        step.rewards[tokens],
        torch.arange(len(order)).repeat_interleave(lengths),
        step.groups[torch.from_numpy(order)],
        step.values[tokens],
    )
    torch.testing.assert_close(
        advantages_of(name, shuffled, DISCOUNTED), advantages_of(name, step, DISCOUNTED)[tokens], atol=1e-8, rtol=1e-6
    )


@pytest.mark.parametrize("name", ["dr_grpo", "rloo"])
@given(scale=st.floats(0.1, 100), shift=st.floats(-100, 100))
def test_differences_ignore_a_shift_and_follow_the_scale(name: str, scale: float, shift: float) -> None:
    moved = outcome_step([scale * reward + shift for reward in (1.0, 3.0, 5.0, 5.0, 0.0)], [9, 9, 2, 9, 2])
    expected = [scale * advantage for advantage in per_response(name, BY_HAND)]
    assert per_response(name, moved) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("name", ["grpo", "reinforce_plus_plus_baseline"])
@given(scale=st.floats(0.1, 100), shift=st.floats(-100, 100))
def test_normalised_group_advantages_ignore_shift_and_scale(name: str, scale: float, shift: float) -> None:
    moved = outcome_step([scale * reward + shift for reward in (1.0, 3.0, 5.0, 5.0, 0.0)], [9, 9, 2, 9, 2])
    assert per_response(name, moved) == pytest.approx(per_response(name, BY_HAND), abs=1e-4)


@pytest.mark.parametrize("name", ["gae", "reinforce_plus_plus"])
@given(seed=st.integers(0, 2**32 - 1), scale=st.floats(0.1, 100))
def test_whitened_advantages_ignore_the_scale(name: str, seed: int, scale: float) -> None:
    step = make_step(seed)
    assert step.values is not None
    scaled = replace(step, rewards=step.rewards * scale, values=step.values * scale)
    advantages = advantages_of(name, step, DISCOUNTED)
    torch.testing.assert_close(advantages_of(name, scaled, DISCOUNTED), advantages, atol=1e-3, rtol=1e-3)
    assert abs(float(advantages.mean())) < 1e-9


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
def test_one_token_has_advantage_zero(name: str) -> None:
    one = torch.ones(1, dtype=torch.float64)
    step = StepRewards(one, torch.tensor([0]), torch.tensor([5]), values=one / 2)
    assert advantages_of(name, step).tolist() == [0.0]


@pytest.mark.parametrize("name", ["gae", "reinforce_plus_plus"])
def test_equal_advantages_whiten_to_zero(name: str) -> None:
    step = StepRewards(
        torch.full((3,), 0.1, dtype=torch.float64),
        torch.arange(3),
        torch.arange(3),
        values=torch.zeros(3, dtype=torch.float64),
    )
    torch.testing.assert_close(advantages_of(name, step), torch.zeros(3, dtype=torch.float64), atol=1e-9, rtol=0)


def test_the_registries_agree() -> None:
    without_critic = replace(make_step(0), values=None)
    for name in ADVANTAGES:
        if name in NEEDS_CRITIC:
            with pytest.raises(ValueError, match="needs the values of a critic"):
                advantages_of(name, without_critic)
        else:
            assert torch.equal(advantages_of(name, without_critic), advantages_of(name, make_step(0)))
    assert set(ADVANTAGES) >= NEEDS_CRITIC | GROUP_RELATIVE


@pytest.mark.parametrize(
    ("rewards", "sequences", "groups", "message"),
    [
        ([1.0, float("nan")], [0, 0], [0], "a reward is not finite"),
        ([1.0, 2.0], [0], [0], "differ in shape"),
        ([], [], [], "non-empty"),
        ([1.0, 2.0], [0, 2], [0, 0, 0], "tokens of the 3 responses must lie in order, at least one each"),
        ([1.0, 2.0, 3.0], [0, 1, 0], [0, 0], "must lie in order"),
        ([1.0, 2.0], [0, 1], [0], "must lie in order"),
    ],
)
def test_bad_input_is_refused(rewards: list[float], sequences: list[int], groups: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepRewards(torch.tensor(rewards), torch.tensor(sequences, dtype=torch.int64), torch.tensor(groups))


def test_values_that_are_not_finite_are_refused() -> None:
    step = make_step(0)
    assert step.values is not None
    with pytest.raises(ValueError, match="the critic has diverged"):
        replace(step, values=step.values / 0)


@pytest.mark.parametrize("settings", [{"gamma": 1.1}, {"gae_lambda": -0.1}])
def test_impossible_discounts_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        AdvantageSettings(**settings)
