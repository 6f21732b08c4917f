"""Figures of one training step, summed over tokens, micro-batches and ranks before any division."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from learner.distributed import all_reduce
from learner.losses import effective_sample_size

# Sums that ``report`` divides by the number of optimizer steps, because each holds its denominators already.
LOSSES = ("loss", "policy_loss", "value_loss")
# Sums over the trained response tokens that ``report`` divides by their number.
TOKEN_SUMS = (
    "kl_ref",
    "entropy",
    "clip_fraction",
    "ratio_mean",
    "mismatch_kl",
    "importance_mean",
    "importance_capped",
    "correction_masked",
    "value_clip_fraction",
)
COUNTS = ("tokens", "input_tokens", "micro_batches")
_SUMS = (*LOSSES, *TOKEN_SUMS, "importance_square", *COUNTS)
_MAXIMA = ("ratio_max", "importance_max")


class StepMetrics:
    """Accumulates figures on the device; nothing is read back before ``report``."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._maxima: dict[str, Tensor] = {}

    def add(self, sums: Mapping[str, Tensor], maxima: Mapping[str, Tensor] | None = None) -> None:
        """One micro-batch's share, scalars by name; a name that is left out adds nothing."""
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach().double()
        for name, value in (maxima or {}).items():
            known = self._maxima.get(name)
            self._maxima[name] = value.detach().double() if known is None else torch.maximum(known, value.double())

    def report(self, optimizer_steps: int) -> dict[str, float]:
        """Token means over the whole step on all ranks, which call this together; losses are means over updates."""
        total = dict(zip(_SUMS, all_reduce(_read(self._sums, _SUMS)), strict=True))
        peak = dict(zip(_MAXIMA, all_reduce(_read(self._maxima, _MAXIMA), maximum=True), strict=True))
        tokens = total["tokens"]
        return {
            **{name: total[name] / optimizer_steps for name in LOSSES},
            **{name: total[name] / tokens for name in TOKEN_SUMS},
            **peak,
            "ess": effective_sample_size(total["importance_mean"], total["importance_square"], tokens),
            **{name: total[name] for name in COUNTS},
        }


def _read(figures: Mapping[str, Tensor], names: tuple[str, ...]) -> list[float]:
    """The figures in the order of ``names``, read from the device in one go; 0 for what no micro-batch had."""
    if not figures:
        return [0.0] * len(names)
    zero = torch.zeros_like(next(iter(figures.values())))
    return torch.stack([figures.get(name, zero) for name in names]).tolist()
