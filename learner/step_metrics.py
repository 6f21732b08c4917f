"""Figures of one training step, summed over tokens, micro-batches and ranks before any division."""

from __future__ import annotations

import torch
from torch import Tensor

from learner.distributed import all_reduce
from learner.losses import PolicyTerms, TokenLosses, effective_sample_size, kl_k3
from learner.ratios import probability_ratio

_SUMS = (
    "loss",
    "policy_loss",
    "kl_ref",
    "entropy",
    "clipped",
    "ratio",
    "mismatch_kl",
    "importance",
    "importance_square",
    "capped",
    "tokens",
    "input_tokens",
    "micro_batches",
)
_MAXIMA = ("ratio_max", "importance_max")


class StepMetrics:
    """Accumulates per-token figures on the device; nothing is read back before ``report``."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._maxima: list[Tensor] = []

    @torch.no_grad()
    def add(
        self,
        terms: PolicyTerms,
        losses: TokenLosses,
        entropy: Tensor,
        kl: Tensor,
        weights: Tensor,
        objective: Tensor,
        importance_cap: float,
        input_tokens: int,
    ) -> None:
        """One micro-batch: vectors are float [N]; ``objective`` is its share of the step's loss, a scalar."""
        importance = probability_ratio(terms.proximal, terms.behaviour)
        per_token = torch.stack(
            [
                kl,
                entropy,
                losses.clipped.float(),
                losses.ratio,
                # k3 of KL(mu || prox), an expectation under mu: the tokens were drawn from mu.
                kl_k3(terms.behaviour, terms.proximal),
                importance,
                importance.square(),
                (importance > importance_cap).float(),
                torch.ones_like(entropy),
            ]
        )
        totals = torch.stack([objective, (losses.losses * weights).sum()])
        counts = totals.new_tensor([input_tokens, 1.0])
        self._sums.append(torch.cat([totals, per_token.sum(1), counts]).double())
        self._maxima.append(torch.stack([losses.ratio.max(), importance.max()]).double())

    def report(self, optimizer_steps: int) -> dict[str, float]:
        """Token means over the whole step on all ranks, which call this together; losses are means over updates."""
        sums = torch.stack(self._sums).sum(0).tolist() if self._sums else [0.0] * len(_SUMS)
        maxima = torch.stack(self._maxima).amax(0).tolist() if self._maxima else [0.0] * len(_MAXIMA)
        total = dict(zip(_SUMS, all_reduce(sums), strict=True))
        peak = dict(zip(_MAXIMA, all_reduce(maxima, maximum=True), strict=True))
        tokens = total["tokens"]
        return {
            "loss": total["loss"] / optimizer_steps,
            "policy_loss": total["policy_loss"] / optimizer_steps,
            "kl_ref": total["kl_ref"] / tokens,
            "entropy": total["entropy"] / tokens,
            "clip_fraction": total["clipped"] / tokens,
            "ratio_mean": total["ratio"] / tokens,
            "ratio_max": peak["ratio_max"],
            "mismatch_kl": total["mismatch_kl"] / tokens,
            "importance_mean": total["importance"] / tokens,
            "importance_max": peak["importance_max"],
            "importance_capped": total["capped"] / tokens,
            "ess": effective_sample_size(total["importance"], total["importance_square"], tokens),
            "tokens": tokens,
            "input_tokens": total["input_tokens"],
            "micro_batches": total["micro_batches"],
        }
