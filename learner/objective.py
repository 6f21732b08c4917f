"""What one micro-batch adds to the objectives of policy and critic, and to the figures of the step.

Pure functions of what the models said: which algorithm runs is a matter of names in the settings.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from learner.batch import MicroBatch
from learner.experience import Streams
from learner.losses import (
    KL_ESTIMATORS,
    LOSSES,
    PolicyTerms,
    StepTotals,
    TokenLosses,
    correction_weights,
    kl_k3,
    token_weights,
    value_loss,
    weighted_sum,
)
from learner.policy import ResponseScores
from learner.proximal import loglinear_proximal
from learner.ratios import probability_ratio
from learner.settings import TrainerSettings
from learner.step_metrics import StepMetrics


def policy_objective(
    scores: ResponseScores,
    batch: MicroBatch,
    streams: Streams,
    totals: StepTotals,
    version: int,
    settings: TrainerSettings,
    metrics: StepMetrics,
) -> Tensor:
    """sum_t w_t (policy_t + kl_coef KL_t - entropy_coef H_t), a scalar with the gradient of ``scores``.

    ``version`` is the policy version that the step started from.
    """
    terms = policy_terms(scores.logprobs, batch, streams, version, settings)
    losses = LOSSES[settings.loss](terms, settings.loss_settings())
    weights = token_weights(batch.lengths, totals, settings.denominator, settings.max_response_tokens)
    per_token = losses.losses
    kl: Tensor | None = None
    if streams.reference is not None:
        kl = KL_ESTIMATORS[settings.kl_estimator](scores.logprobs, streams.reference)
        if settings.kl_in == "loss":
            per_token = per_token + settings.kl_coef * kl
    if settings.entropy_coef:
        per_token = per_token - settings.entropy_coef * scores.entropy
    if batch.responses == 0:
        return weighted_sum(per_token, torch.zeros_like(weights))
    objective = weighted_sum(per_token, weights)
    with torch.no_grad():
        metrics.add({"loss": objective, "policy_loss": (losses.losses * weights).sum()})
        _note_policy(terms, losses, scores.entropy, kl, settings, batch, metrics)
    return objective


def policy_terms(
    logprobs: Tensor, batch: MicroBatch, streams: Streams, version: int, settings: TrainerSettings
) -> PolicyTerms:
    """What the policy loss reads. With a single minibatch the current policy is the proximal one."""
    if streams.proximal is not None:
        proximal = streams.proximal
    elif settings.minibatches == 1:
        proximal = logprobs.detach()
    else:
        proximal = loglinear_proximal(logprobs, batch.behaviour, version - batch.versions)
    return PolicyTerms(logprobs, proximal, batch.behaviour, streams.advantages, batch.sequences)


def value_objective(
    values: Tensor,
    batch: MicroBatch,
    streams: Streams,
    totals: StepTotals,
    settings: TrainerSettings,
    metrics: StepMetrics,
) -> Tensor:
    """Mean over the step's tokens of the clipped value loss, a scalar with a gradient.

    Always a token mean: the denominators of the policy weigh responses, a regression has no reason to.
    """
    assert streams.values is not None
    assert streams.returns is not None
    clip = math.inf if settings.value_clip is None else settings.value_clip
    losses = value_loss(values, streams.values, streams.returns, clip)
    if batch.responses == 0:
        return weighted_sum(losses.losses, torch.zeros_like(values))
    objective = losses.losses.sum() / totals.tokens
    # The figures are means over the critic's passes.
    passes = settings.critic_epochs
    metrics.add({"value_loss": objective / passes, "value_clip_fraction": losses.clipped.sum() / passes})
    return objective


def _note_policy(
    terms: PolicyTerms,
    losses: TokenLosses,
    entropy: Tensor,
    kl: Tensor | None,
    settings: TrainerSettings,
    batch: MicroBatch,
    metrics: StepMetrics,
) -> None:
    importance = probability_ratio(terms.proximal, terms.behaviour)
    masked = correction_weights(terms, settings.loss_settings()) == 0
    sums = {
        "entropy": entropy.sum(),
        "clip_fraction": losses.clipped.sum(),
        "ratio_mean": losses.ratio.sum(),
        # k3 of KL(mu || prox), an expectation under mu: the tokens were drawn from mu.
        "mismatch_kl": kl_k3(terms.behaviour, terms.proximal).sum(),
        "importance_mean": importance.sum(),
        "importance_square": importance.square().sum(),
        "importance_capped": (importance > settings.importance_cap).sum(),
        "correction_masked": masked.sum(),
        "tokens": importance.new_tensor(len(importance)),
        "input_tokens": importance.new_tensor(batch.input_tokens),
        "micro_batches": importance.new_tensor(1),
    }
    if kl is not None:
        sums["kl_ref"] = kl.sum()
    metrics.add(sums, {"ratio_max": losses.ratio.max(), "importance_max": importance.max()})
