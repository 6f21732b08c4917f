"""Advantage estimators on the per-token streams of a whole training step.

Every estimator reads the whole step at once, before minibatches are cut, so that groups stay complete and a
normalisation covers the same tokens however many ranks there are. All are pure functions ``(StepRewards,
AdvantageSettings) -> Advantages`` in float64. Adding an estimator is one function and one entry in
``ADVANTAGES``.

Notation: r_t reward of token t, R_i sum of the rewards of response i, V_t value of the state before token t.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Added to standard deviations: rewards are of order 1, so this only guards against division by zero.
STD_EPSILON = 1e-6
WHITENINGS = ("step", "group")


@dataclass(frozen=True)
class StepRewards:
    """Rewards of one step, its T response tokens laid end to end, response after response.

    Attributes:
        rewards: float64 [T], the task reward on the last token of each response, minus the KL of every token
            where the KL is part of the reward.
        sequences: int64 [T], the response of each token, 0..n-1 without gaps and never decreasing.
        groups: int64 [n], the group of each response; ids need not be contiguous or sorted.
        values: float64 [T], the critic's value of the state before each token; None without a critic.

    Raises:
        ValueError: the shapes do not fit together, there is no token, a response is missing or split, or a
            number is not finite.
    """

    rewards: Tensor
    sequences: Tensor
    groups: Tensor
    values: Tensor | None = None

    def __post_init__(self) -> None:
        for name, stream in (("sequences", self.sequences), ("values", self.values)):
            if stream is not None and stream.shape != self.rewards.shape:
                raise ValueError(
                    f"rewards {tuple(self.rewards.shape)} and {name} {tuple(stream.shape)} differ in shape"
                )
        if self.rewards.ndim != 1 or self.rewards.numel() == 0:
            raise ValueError(f"rewards must be a non-empty vector of tokens, got shape {tuple(self.rewards.shape)}")
        present = torch.unique_consecutive(self.sequences)
        if not torch.equal(present, torch.arange(len(self.groups), device=present.device)):
            raise ValueError(f"the tokens of the {len(self.groups)} responses must lie in order, at least one each")
        if not bool(torch.isfinite(self.rewards).all()):
            raise ValueError("a reward is not finite: an unavailable score must never reach the learner")
        if self.values is not None and not bool(torch.isfinite(self.values).all()):
            raise ValueError("a value is not finite: the critic has diverged, lower its learning rate")


@dataclass(frozen=True)
class AdvantageSettings:
    """What GAE and discounted returns read; the first three are in [0, 1].

    Attributes:
        gamma: discount per token.
        gae_lambda: trade-off of bias against variance in the policy's advantages.
        critic_lambda: the same in the critic's targets; None for ``gae_lambda``.
        whitening: over what GAE's advantages are standardised, the tokens of the "step" or each "group".

    Raises:
        ValueError: a number is out of range, or the whitening unknown.
    """

    gamma: float = 1.0
    gae_lambda: float = 1.0
    critic_lambda: float | None = None
    whitening: str = "step"

    def __post_init__(self) -> None:
        for name in ("gamma", "gae_lambda", "critic_lambda"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        if self.whitening not in WHITENINGS:
            raise ValueError(f"unknown whitening {self.whitening!r}: choose one of {', '.join(WHITENINGS)}")


@dataclass(frozen=True)
class Advantages:
    """``advantages`` float64 [T], and ``returns`` float64 [T], the critic's targets (None without a critic)."""

    advantages: Tensor
    returns: Tensor | None = None


AdvantageFunction = Callable[[StepRewards, AdvantageSettings], Advantages]


def discounted_suffix_sums(stream: Tensor, sequences: Tensor, discount: float) -> Tensor:
    """S_t = sum over k >= 0 of discount^k stream_{t+k}, inside the response of t; float [T].

    By doubling: a pass adds to the sum of the next ``reach`` tokens that of the ``reach`` tokens after them,
    so log2 of the longest response passes over the stream suffice and nothing is padded.
    """
    sums = stream.clone()
    longest = int(torch.bincount(sequences).max())
    reach = 1
    while reach < longest:
        inside = sequences[reach:] == sequences[:-reach]
        sums[:-reach] += torch.where(inside, discount**reach * sums[reach:], 0.0)
        reach *= 2
    return sums


def standardised(values: Tensor) -> Tensor:
    """(x - mean) / (std + eps) with the population std, float [N]; zeros for one element or equal ones."""
    return (values - values.mean()) / (values.std(correction=0) + STD_EPSILON)


def gae(step: StepRewards, settings: AdvantageSettings) -> Advantages:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16), then standardised over the tokens of the step.

    With ``whitening`` "group" over each group instead, in which every response weighs the same: GRPO's advantages, less
    what the critic says of each token. With a critic that says the same everywhere they are GRPO's.

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lambda A_{t+1}; the episode ends with its
    response, so V and A after the last token are 0. Returns are A + V of the raw advantages, with ``critic_lambda``
    in the place of lambda where it is set (decoupled GAE: VC-PPO, arXiv 2503.01491; with 1 the critic
    learns from unbiased returns while the policy takes its bias for less variance).

    Raises:
        ValueError: the step has no values.
    """
    if step.values is None:
        raise ValueError("gae needs the values of a critic: configure one, or choose a group-relative estimator")
    following = torch.zeros_like(step.values)
    inside = step.sequences[1:] == step.sequences[:-1]
    following[:-1] = torch.where(inside, step.values[1:], 0.0)
    deltas = step.rewards + settings.gamma * following - step.values
    raw = discounted_suffix_sums(deltas, step.sequences, settings.gamma * settings.gae_lambda)
    targets = raw
    if settings.critic_lambda is not None:
        targets = discounted_suffix_sums(deltas, step.sequences, settings.gamma * settings.critic_lambda)
    if settings.whitening == "group":
        lengths = torch.bincount(step.sequences).to(raw.dtype)
        whitened = standardised_within(raw, step.groups[step.sequences], 1 / lengths[step.sequences])
    else:
        whitened = standardised(raw)
    return Advantages(whitened, returns=targets + step.values)


def reinforce_plus_plus(step: StepRewards, settings: AdvantageSettings) -> Advantages:
    """Discounted reward-to-go of every token, standardised over the step's tokens (arXiv 2501.03262)."""
    return Advantages(standardised(discounted_suffix_sums(step.rewards, step.sequences, settings.gamma)))


def sequence_rewards(step: StepRewards) -> Tensor:
    """R_i, the sum of the rewards of each response, float64 [n]."""
    return torch.zeros(len(step.groups), dtype=step.rewards.dtype).index_add(0, step.sequences, step.rewards)


@dataclass(frozen=True)
class GroupStatistics:
    """Each element's view of its group, each float64 [n]: ``mean``, population ``std`` and ``size``."""

    mean: Tensor
    std: Tensor
    size: Tensor


def group_statistics(values: Tensor, groups: Tensor, weights: Tensor | None = None) -> GroupStatistics:
    """Statistics of ``values`` float64 [n] over the elements that share an id in ``groups`` int64 [n].

    ``weights`` float64 [n], positive, weigh the elements; ``size`` is then the sum of a group's weights.
    """
    _, index = torch.unique(groups, return_inverse=True)
    weights = torch.ones_like(values) if weights is None else weights
    nothing = values.new_zeros(int(index.max()) + 1)
    size = nothing.index_add(0, index, weights)
    mean = nothing.index_add(0, index, weights * values) / size
    variance = nothing.index_add(0, index, weights * (values - mean[index]).square()) / size
    return GroupStatistics(mean=mean[index], std=variance.sqrt()[index], size=size[index])


def standardised_within(values: Tensor, groups: Tensor, weights: Tensor | None = None) -> Tensor:
    """(x - mean) / (std + eps) of ``values`` float64 [n], mean and std those of the element's group."""
    statistics = group_statistics(values, groups, weights)
    return (values - statistics.mean) / (statistics.std + STD_EPSILON)


def grpo(step: StepRewards, settings: AdvantageSettings) -> Advantages:
    """A_i = (R_i - mean_G R) / (std_G R + eps) on every token (DeepSeekMath, arXiv 2402.03300, section 4.1.2).

    The standard deviation is the population one: the group is the whole set the paper averages over.
    """
    return Advantages(standardised_within(sequence_rewards(step), step.groups)[step.sequences])


def dr_grpo(step: StepRewards, settings: AdvantageSettings) -> Advantages:
    """A_i = R_i - mean_G R, without the std that favours too easy and too hard prompts (arXiv 2503.20783)."""
    rewards = sequence_rewards(step)
    return Advantages((rewards - group_statistics(rewards, step.groups).mean)[step.sequences])


def rloo(step: StepRewards, settings: AdvantageSettings) -> Advantages:
    """A_i = R_i - mean of the others' rewards in the group (RLOO, arXiv 2402.14740); 0 in a group of one."""
    rewards = sequence_rewards(step)
    statistics = group_statistics(rewards, step.groups)
    # R_i - (G mean - R_i) / (G - 1) = (R_i - mean) G / (G - 1).
    others = (statistics.size - 1).clamp(min=1)
    return Advantages(((rewards - statistics.mean) * statistics.size / others)[step.sequences])


def reinforce_plus_plus_baseline(step: StepRewards, settings: AdvantageSettings) -> Advantages:
    """R_i - mean_G R, standardised over the step's responses (REINFORCE++ with baseline, arXiv 2501.03262).

    The statistics are over responses, not over tokens as in some implementations: then the mean is 0 whatever
    the lengths, and a group with equal rewards keeps advantage 0.
    """
    rewards = sequence_rewards(step)
    centred = rewards - group_statistics(rewards, step.groups).mean
    return Advantages(standardised(centred)[step.sequences])


ADVANTAGES: dict[str, AdvantageFunction] = {
    "gae": gae,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "reinforce_plus_plus": reinforce_plus_plus,
    "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
}
# Those that read StepRewards.values.
NEEDS_CRITIC = frozenset({"gae"})
# Those for which a group with equal rewards teaches nothing.
GROUP_RELATIVE = frozenset({"grpo", "dr_grpo", "rloo", "reinforce_plus_plus_baseline"})
