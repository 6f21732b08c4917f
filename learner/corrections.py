"""Importance weights that correct for tokens drawn by the behaviour policy instead of the proximal one.

The tokens come from mu, an older policy or one computed with other kernels, while the loss is written for
samples of prox, the policy at the start of the step. A correction returns the weight of every token,
``(log_ratios, sequences, low, cap) -> float [N]`` without gradient, where rho_t = exp(log_ratios_t) =
pi_prox / mu. A masked token has weight 0 and stays in the denominators: else the remaining ones would be
weighted up. Adding a correction is one function and one entry in ``CORRECTIONS``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from learner.ratios import bounded_exp, sequence_means, sequence_sums

Correction = Callable[[Tensor, Tensor, float, float], Tensor]


def none(log_ratios: Tensor, sequences: Tensor, low: float, cap: float) -> Tensor:
    """1: the samples are taken as if they came from the proximal policy."""
    return torch.ones_like(log_ratios)


def truncate(log_ratios: Tensor, sequences: Tensor, low: float, cap: float) -> Tensor:
    """min(rho_t, cap), truncated importance sampling (TIS, fengyao.notion.site/off-policy-rl)."""
    return bounded_exp(log_ratios).clamp(max=cap)


def mask(log_ratios: Tensor, sequences: Tensor, low: float, cap: float) -> Tensor:
    """rho_t where low <= rho_t <= cap, else 0 (IcePop; 0.5 and 5 in NeMo-RL)."""
    ratios = bounded_exp(log_ratios)
    return torch.where((ratios >= low) & (ratios <= cap), ratios, 0.0)


def sequence_truncate(log_ratios: Tensor, sequences: Tensor, low: float, cap: float) -> Tensor:
    """min(prod_t rho_t, cap), one weight for the whole response: unbiased but for the cap."""
    return bounded_exp(sequence_sums(log_ratios, sequences)).clamp(max=cap)


def sequence_mask(log_ratios: Tensor, sequences: Tensor, low: float, cap: float) -> Tensor:
    """rho_t where the geometric mean of the response's ratios is in [low, cap], else 0 for the whole response.

    The mean stays near 1 whatever the length, so the band is narrow: 0.999 to 1.002 in NeMo-RL, which calls
    this seq-mask-tis.
    """
    means = bounded_exp(sequence_means(log_ratios, sequences))
    return torch.where((means >= low) & (means <= cap), bounded_exp(log_ratios), 0.0)


CORRECTIONS: dict[str, Correction] = {
    "none": none,
    "truncate": truncate,
    "mask": mask,
    "sequence_truncate": sequence_truncate,
    "sequence_mask": sequence_mask,
}
