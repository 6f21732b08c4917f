"""Policy losses, KL estimators and the reductions that turn per-token values into one number.

All functions are pure and work on flat vectors of response tokens, whatever rows or ranks the tokens sit in.
A loss returns one value per token; ``token_weights`` decides how tokens are averaged, with denominators that
cover the whole training step, so the gradient does not depend on how the step was cut into micro-batches or
spread over ranks.

Notation: mu = behaviour policy (sampled the tokens), prox = proximal policy (start of the step), theta =
current one. Adding a loss is one function and one entry in ``LOSSES``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# exp(20) is about 5e8: far beyond any clip range or cap, far below overflow in float32.
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True)
class PolicyTerms:
    """What a policy loss reads, each float32 [N] over the response tokens; only ``logprobs`` carries a gradient."""

    logprobs: Tensor
    proximal: Tensor
    behaviour: Tensor
    advantages: Tensor


@dataclass(frozen=True)
class LossSettings:
    """Trust-region bounds: ratios are clipped to [1 - clip_low, 1 + clip_high], importance weights to
    importance_cap.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    importance_cap: float = 2.0

    def __post_init__(self) -> None:
        if not 0 <= self.clip_low <= 1 or self.clip_high < 0:
            raise ValueError(
                f"clip_low must be in [0, 1] and clip_high at least 0, got {self.clip_low} and {self.clip_high}"
            )
        if self.importance_cap <= 0:
            raise ValueError(f"importance_cap must be positive (use inf for no cap), got {self.importance_cap}")


@dataclass(frozen=True)
class TokenLosses:
    """One policy loss, per token.

    ``losses`` float [N] is to be minimised and differentiable; ``ratio`` float [N] is the trust-region ratio
    and ``clipped`` bool [N] marks the tokens whose gradient the clip removed; both are detached.
    """

    losses: Tensor
    ratio: Tensor
    clipped: Tensor


LossFunction = Callable[[PolicyTerms, LossSettings], TokenLosses]
KLEstimator = Callable[[Tensor, Tensor], Tensor]


def probability_ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """exp(numerator - denominator) of two log-probabilities, the exponent clamped to +-20 against overflow."""
    return (numerator - denominator).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def truncated_importance_weights(proximal: Tensor, behaviour: Tensor, cap: float) -> Tensor:
    """w_t = sg(min(pi_prox / mu, cap)), float [N] without gradient (truncated importance sampling, TIS)."""
    return probability_ratio(proximal, behaviour).clamp(max=cap).detach()


def clipped_surrogate(terms: PolicyTerms, anchor: Tensor, settings: LossSettings) -> TokenLosses:
    """-min(r A, clip(r, 1 - low, 1 + high) A) with r = pi_theta / pi_anchor (PPO, arXiv 1707.06347, eq. 7).

    Separate bounds are DAPO's clip-higher (arXiv 2503.14476, section 3.1).
    """
    ratio = probability_ratio(terms.logprobs, anchor)
    bounded = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    unclipped_objective, clipped_objective = ratio * terms.advantages, bounded * terms.advantages
    return TokenLosses(
        losses=-torch.minimum(unclipped_objective, clipped_objective),
        ratio=ratio.detach(),
        clipped=(clipped_objective < unclipped_objective).detach(),
    )


def ppo_clip(terms: PolicyTerms, settings: LossSettings) -> TokenLosses:
    """PPO-clip around the proximal policy; right only when the samples come from it (no staleness)."""
    return clipped_surrogate(terms, terms.proximal, settings)


def decoupled_ppo(terms: PolicyTerms, settings: LossSettings) -> TokenLosses:
    """w_t times PPO-clip around the proximal policy, w_t = sg(min(pi_prox / mu, cap)).

    The trust region is measured from the start of the step while the weight corrects for stale or differently
    computed behaviour probabilities (Hilton et al., arXiv 2110.00641, for the decoupling; AReaL, arXiv
    2505.24298, for LLMs).
    """
    surrogate = clipped_surrogate(terms, terms.proximal, settings)
    weights = truncated_importance_weights(terms.proximal, terms.behaviour, settings.importance_cap)
    return TokenLosses(weights * surrogate.losses, surrogate.ratio, surrogate.clipped)


def behaviour_ppo(terms: PolicyTerms, settings: LossSettings) -> TokenLosses:
    """PPO-clip around the behaviour policy itself; no extra weight, since r already contains pi_prox / mu."""
    return clipped_surrogate(terms, terms.behaviour, settings)


def tis(terms: PolicyTerms, settings: LossSettings) -> TokenLosses:
    """-sg(min(pi_theta / mu, cap)) A log pi_theta: REINFORCE with truncated importance weights, no clip range."""
    ratio = probability_ratio(terms.logprobs, terms.behaviour).detach()
    losses = -ratio.clamp(max=settings.importance_cap) * terms.advantages * terms.logprobs
    return TokenLosses(losses, ratio, torch.zeros_like(ratio, dtype=torch.bool))


def kl_k1(logprobs: Tensor, reference: Tensor) -> Tensor:
    """d = log pi - log pi_ref: unbiased, can be negative; useless as a loss (its expected gradient is 0)."""
    return logprobs - reference


def kl_k2(logprobs: Tensor, reference: Tensor) -> Tensor:
    """d^2 / 2: biased value, but on-policy its gradient is the gradient of the KL divergence."""
    return (logprobs - reference).square() / 2


def kl_k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """exp(-d) - 1 + d: unbiased and never negative (joschu.net/blog/kl-approx.html; GRPO, arXiv 2402.03300, eq. 4)."""
    difference = (logprobs - reference).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(-difference) + difference


@dataclass(frozen=True)
class StepTotals:
    """What the denominators count, over the whole optimizer step and all ranks."""

    tokens: float
    sequences: float


def token_weights(lengths: Tensor, totals: StepTotals, denominator: str, max_response_tokens: int) -> Tensor:
    """Weight of every token such that the step's loss is the plain sum of weight x per-token loss.

    Args:
        lengths: float or int [N], for every token the length of the response it belongs to.
        totals: counts over the whole step. Tokens that a loss masks out stay counted, as in AReaL.
        denominator: "token_mean" 1 / sum |y_i| (DAPO, arXiv 2503.14476); "sequence_mean" 1 / (n |y_i|) (GRPO,
            arXiv 2402.03300); "constant" 1 / (n max_response_tokens) (Dr. GRPO, arXiv 2503.20783).
        max_response_tokens: the constant of "constant".

    Returns:
        float32 [N].

    Raises:
        ValueError: an unknown denominator.
    """
    lengths = lengths.to(torch.float32)
    if denominator == "token_mean":
        return torch.full_like(lengths, 1.0 / totals.tokens)
    if denominator == "sequence_mean":
        return 1.0 / (totals.sequences * lengths)
    if denominator == "constant":
        return torch.full_like(lengths, 1.0 / (totals.sequences * max_response_tokens))
    raise ValueError(f"unknown denominator {denominator!r}: choose one of {', '.join(DENOMINATORS)}")


def weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """sum_t weights_t x values_t, a scalar; tokens of weight 0 contribute nothing even if their value is not finite."""
    return torch.where(weights == 0, 0.0, values * weights).sum()


def effective_sample_size(weight_sum: float, square_sum: float, count: float) -> float:
    """(sum w)^2 / (n sum w^2) in (0, 1]: 1 when all importance weights are equal (Kong 1992)."""
    return weight_sum * weight_sum / (count * square_sum) if square_sum > 0 else 0.0


LOSSES: dict[str, LossFunction] = {
    "ppo_clip": ppo_clip,
    "decoupled_ppo": decoupled_ppo,
    "behaviour_ppo": behaviour_ppo,
    "tis": tis,
}
KL_ESTIMATORS: dict[str, KLEstimator] = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}
DENOMINATORS = ("token_mean", "sequence_mean", "constant")
