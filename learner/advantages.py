"""Advantage estimators for groups of samples that answer the same prompt.

Every estimator takes the rewards of a whole training step, before the samples are spread over ranks, so that
a group is never cut in two. All are pure functions: ``(rewards float [N], groups int64 [N]) -> advantages
float [N]``. Adding an estimator is one function and one entry in ``ADVANTAGES``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

AdvantageFunction = Callable[[Tensor, Tensor], Tensor]

# The floor on the standard deviation: rewards are of order 1, so this only guards against division by zero.
STD_EPSILON = 1e-6


@dataclass(frozen=True)
class GroupStatistics:
    """Per-sample view of the group statistics, each float [N]: ``mean``, population ``std`` and group ``size``."""

    mean: Tensor
    std: Tensor
    size: Tensor


def group_statistics(rewards: Tensor, groups: Tensor) -> GroupStatistics:
    """Mean, population standard deviation and size of each sample's group.

    Args:
        rewards: float [N].
        groups: integer [N]; samples with equal ids form one group. Ids need not be contiguous or sorted.

    Raises:
        ValueError: the shapes differ, there is no sample, or a reward is not finite.
    """
    if rewards.ndim != 1 or rewards.shape != groups.shape or rewards.numel() == 0:
        raise ValueError(
            f"rewards and groups must be non-empty vectors of one length, "
            f"got {tuple(rewards.shape)}, {tuple(groups.shape)}"
        )
    if not bool(torch.isfinite(rewards).all()):
        raise ValueError("a reward is not finite: an unavailable score must never reach the learner")
    _, index = torch.unique(groups, return_inverse=True)
    counts = torch.zeros(int(index.max()) + 1, dtype=rewards.dtype).index_add(0, index, torch.ones_like(rewards))
    mean = torch.zeros_like(counts).index_add(0, index, rewards) / counts
    deviation = rewards - mean[index]
    variance = torch.zeros_like(counts).index_add(0, index, deviation.square()) / counts
    return GroupStatistics(mean=mean[index], std=variance.sqrt()[index], size=counts[index])


def grpo(rewards: Tensor, groups: Tensor) -> Tensor:
    """A_i = (R_i - mean_G R) / (std_G R + eps) (DeepSeekMath, arXiv 2402.03300, section 4.1.2).

    The standard deviation is the population one (the group is the whole set the paper averages over). A group
    whose rewards are all equal, a group of one included, gets advantage 0.
    """
    statistics = group_statistics(rewards, groups)
    return (rewards - statistics.mean) / (statistics.std + STD_EPSILON)


def grpo_no_std(rewards: Tensor, groups: Tensor) -> Tensor:
    """A_i = R_i - mean_G R, without the division that favours too easy and too hard prompts (Dr. GRPO, 2503.20783)."""
    return rewards - group_statistics(rewards, groups).mean


def rloo(rewards: Tensor, groups: Tensor) -> Tensor:
    """A_i = R_i - mean of the others' rewards in the group (RLOO, arXiv 2402.14740); 0 in a group of one."""
    statistics = group_statistics(rewards, groups)
    # R_i - (G mean - R_i) / (G - 1) = (R_i - mean) G / (G - 1).
    others = (statistics.size - 1).clamp(min=1)
    return (rewards - statistics.mean) * statistics.size / others


ADVANTAGES: dict[str, AdvantageFunction] = {"grpo": grpo, "grpo_no_std": grpo_no_std, "rloo": rloo}
