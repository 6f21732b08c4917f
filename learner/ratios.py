"""Probability ratios of two policies, per token and per response, in the log domain and safe from overflow."""

from __future__ import annotations

import torch
from torch import Tensor

# exp(20) is about 5e8: far beyond any clip range or cap, far below overflow in float32.
MAX_LOG_RATIO = 20.0


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """exp of the log-ratio clamped to +-20."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def probability_ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """pi_numerator / pi_denominator of two log-probabilities of one shape, the exponent clamped to +-20."""
    return bounded_exp(numerator - denominator)


def sequence_sums(values: Tensor, sequences: Tensor) -> Tensor:
    """For every token the sum of ``values`` float [N] over its response ``sequences`` int64 [N]; float [N].

    The buffer has N places although there are fewer responses: their number would cost a wait for the device.
    """
    return torch.zeros_like(values).index_add(0, sequences, values)[sequences]


def sequence_means(values: Tensor, sequences: Tensor) -> Tensor:
    """For every token the mean of ``values`` float [N] over its response ``sequences`` int64 [N]; float [N]."""
    return sequence_sums(values, sequences) / sequence_sums(torch.ones_like(values), sequences)
