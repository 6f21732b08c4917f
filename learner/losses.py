"""Policy and value losses, KL estimators and the reductions that turn per-token values into one number.

All functions are pure and work on flat vectors of response tokens, whatever rows or ranks the tokens sit in.
A loss returns one value per token; ``token_weights`` decides how tokens are averaged, with denominators that
cover the whole training step, so the gradient does not depend on how the step was cut into micro-batches or
spread over ranks.

Notation: mu = behaviour policy (sampled the tokens), prox = proximal policy (start of the step), theta =
current one, A = advantage, sg = stop-gradient. Adding a loss is one function and one entry in ``LOSSES``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from learner.corrections import CORRECTIONS
from learner.ratios import MAX_LOG_RATIO, bounded_exp, probability_ratio, sequence_means


@dataclass(frozen=True)
class PolicyTerms:
    """What a policy loss reads, over the N response tokens of a micro-batch, whose responses are whole.

    Attributes:
        logprobs: float32 [N], log pi_theta; the only one that carries a gradient.
        proximal: float32 [N], log pi_prox.
        behaviour: float32 [N], log mu.
        advantages: float32 [N].
        sequences: int64 [N], the response of each token, counted from 0 and never decreasing.
    """

    logprobs: Tensor
    proximal: Tensor
    behaviour: Tensor
    advantages: Tensor
    sequences: Tensor


@dataclass(frozen=True)
class LossSettings:
    """Bounds of a policy loss.

    Attributes:
        clip_low, clip_high: trust-region ratios are clipped to [1 - clip_low, 1 + clip_high].
        dual_clip: largest ratio that counts against a negative advantage, above 1; None sets no limit.
        correction: a name in ``learner.corrections.CORRECTIONS``, how pi_prox / mu weights the tokens.
        importance_low, importance_cap: the interval of that ratio; what happens outside it is the
            correction's choice. 1 lies inside, so that fresh samples are never touched.

    Raises:
        ValueError: a bound is out of range or the correction unknown.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    correction: str = "truncate"
    importance_low: float = 0.5
    importance_cap: float = 2.0

    def __post_init__(self) -> None:
        if not 0 <= self.clip_low <= 1 or self.clip_high < 0:
            raise ValueError(
                f"clip_low must be in [0, 1] and clip_high at least 0, got {self.clip_low} and {self.clip_high}"
            )
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"dual_clip must be above 1 (3 is usual; null turns it off), got {self.dual_clip}")
        if self.correction not in CORRECTIONS:
            raise ValueError(f"unknown correction {self.correction!r}: choose one of {', '.join(CORRECTIONS)}")
        if not 0 <= self.importance_low <= 1 <= self.importance_cap:
            raise ValueError(
                f"importance_low must be in [0, 1] and importance_cap at least 1 (inf for no cap), "
                f"got {self.importance_low} and {self.importance_cap}"
            )


@dataclass(frozen=True)
class TokenLosses:
    """One policy loss, per token.

    ``losses`` float [N] is to be minimised and differentiable. ``ratio`` float [N] is the trust-region ratio;
    ``clipped`` bool [N] marks the tokens on which its bounds were at work: they take the gradient away in PPO
    and GSPO, and limit it in CISPO and TIS. Both are detached.
    """

    losses: Tensor
    ratio: Tensor
    clipped: Tensor


LossFunction = Callable[[PolicyTerms, LossSettings], TokenLosses]
KLEstimator = Callable[[Tensor, Tensor], Tensor]


def correction_weights(terms: PolicyTerms, settings: LossSettings) -> Tensor:
    """Weight of every token for having been drawn by mu instead of prox, float [N] without gradient."""
    log_ratios = (terms.proximal - terms.behaviour).detach()
    weigh = CORRECTIONS[settings.correction]
    return weigh(log_ratios, terms.sequences, settings.importance_low, settings.importance_cap)


def clipped_surrogate(ratio: Tensor, advantages: Tensor, settings: LossSettings) -> TokenLosses:
    """-min(r A, clip(r, 1 - low, 1 + high) A), all [N] (PPO, arXiv 1707.06347, eq. 7).

    Separate bounds are DAPO's clip-higher (arXiv 2503.14476, section 3.1). With dual clip the objective of a
    negative advantage is at least c A, so that one token whose ratio has exploded cannot rule the step
    (Ye et al., arXiv 1912.09729).
    """
    bounded = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high) * advantages
    objective = torch.minimum(ratio * advantages, bounded)
    clipped = bounded < ratio * advantages
    if settings.dual_clip is not None:
        floor = settings.dual_clip * advantages
        exploded = (advantages < 0) & (objective < floor)
        objective = torch.where(exploded, floor, objective)
        clipped = clipped | exploded
    return TokenLosses(-objective, ratio.detach(), clipped.detach())


def ppo_clip(terms: PolicyTerms, settings: LossSettings) -> TokenLosses:
    """PPO-clip around the proximal policy; right only when the samples come from it (no staleness)."""
    return clipped_surrogate(probability_ratio(terms.logprobs, terms.proximal), terms.advantages, settings)


def decoupled_ppo(terms: PolicyTerms, settings: LossSettings) -> TokenLosses:
    """PPO-clip around the proximal policy times the correction weight.

    The trust region is measured from the start of the step while the weight corrects for stale or differently
    computed behaviour probabilities (Hilton et al., arXiv 2110.00641, for the decoupling; AReaL, arXiv
    2505.24298, for LLMs).
    """
    surrogate = ppo_clip(terms, settings)
    return replace(surrogate, losses=correction_weights(terms, settings) * surrogate.losses)


def behaviour_ppo(terms: PolicyTerms, settings: LossSettings) -> TokenLosses:
    """PPO-clip around the behaviour policy itself; no correction, since r already contains pi_prox / mu."""
    return clipped_surrogate(probability_ratio(terms.logprobs, terms.behaviour), terms.advantages, settings)


def tis(terms: PolicyTerms, settings: LossSettings) -> TokenLosses:
    """-sg(min(pi_theta / mu, cap)) A log pi_theta: REINFORCE with truncated importance weights, no clip range.

    No correction is applied on top: the weight is already the whole ratio to mu.
    """
    ratio = probability_ratio(terms.logprobs, terms.behaviour).detach()
    losses = -ratio.clamp(max=settings.importance_cap) * terms.advantages * terms.logprobs
    return TokenLosses(losses, ratio, clipped=ratio > settings.importance_cap)


def cispo(terms: PolicyTerms, settings: LossSettings) -> TokenLosses:
    """-w sg(clip(r, 1 - low, 1 + high)) A log pi_theta with r = pi_theta / pi_prox (arXiv 2506.13585, eq. 4-5).

    A clipped token keeps its gradient with a bounded weight. The paper bounds from above only: clip_low = 1.
    """
    ratio = probability_ratio(terms.logprobs, terms.proximal).detach()
    bounded = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    losses = -correction_weights(terms, settings) * bounded * terms.advantages * terms.logprobs
    return TokenLosses(losses, ratio, clipped=ratio != bounded)


def gspo(terms: PolicyTerms, settings: LossSettings) -> TokenLosses:
    """PPO-clip on the ratio of the whole response, s_i = exp(mean_t log(pi_theta / pi_prox)), times the correction.

    Each token carries sg(s_i) pi_theta / sg(pi_theta): the value is the response's, the gradient the token's
    own (GSPO-token, arXiv 2507.18071, eq. 13-14). The paper averages with the denominator "sequence_mean" and
    clips at a few 1e-4, since the mean over tokens hardly leaves 1.
    """
    mean = sequence_means((terms.logprobs - terms.proximal).detach(), terms.sequences)
    ratio = bounded_exp(mean) * (terms.logprobs - terms.logprobs.detach()).exp()
    surrogate = clipped_surrogate(ratio, terms.advantages, settings)
    return replace(surrogate, losses=correction_weights(terms, settings) * surrogate.losses)


@dataclass(frozen=True)
class ValueLosses:
    """``losses`` float [N] to be minimised; ``clipped`` bool [N], detached: the tokens the clip spared from it."""

    losses: Tensor
    clipped: Tensor


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> ValueLosses:
    """0.5 max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2), the clipped value loss of PPO's code.

    Where the clip holds, a value that moves further than eps towards its return in one step earns nothing.
    Source: "Implementation Matters in Deep Policy Gradients", arXiv 2005.12729, section 3.

    Args:
        values: float [N], the critic's current values; the only one with a gradient.
        old_values: float [N], its values at the start of the step.
        returns: float [N], the targets.
        clip: eps, positive; inf for the plain squared error.
    """
    nearby = values.clamp(old_values - clip, old_values + clip)
    plain, bounded = (values - returns).square(), (nearby - returns).square()
    return ValueLosses(0.5 * torch.maximum(plain, bounded), clipped=(bounded > plain).detach())


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


def kl_k3_plus(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Value of k3, which is unbiased, with the gradient of k2, which is right (straight-through; "k3+" of verl)."""
    carrier = kl_k2(logprobs, reference)
    return kl_k3(logprobs, reference).detach() + carrier - carrier.detach()


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
    "cispo": cispo,
    "gspo": gspo,
}
KL_ESTIMATORS: dict[str, KLEstimator] = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3, "k3+": kl_k3_plus}
DENOMINATORS = ("token_mean", "sequence_mean", "constant")
