"""AdamW over one model's master weights: its learning rate, its clipping, and a state that exists from the start."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from learner.settings import TrainerSettings

logger = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq")


def learning_rate(step: int, peak: float, settings: TrainerSettings) -> float:
    """Learning rate of training step ``step`` (counted from 0) on the schedule of ``settings`` with this peak.

    Warm-up is linear and reaches the peak at step ``warmup_steps - 1``, so that no step runs at rate 0; a
    decaying schedule would reach 0 at ``total_steps``, one step after the last.
    """
    if step < settings.warmup_steps:
        return peak * (step + 1) / settings.warmup_steps
    if settings.lr_schedule == "constant":
        return peak
    progress = min(1.0, (step - settings.warmup_steps) / (settings.total_steps - settings.warmup_steps))
    if settings.lr_schedule == "linear":
        return peak * (1.0 - progress)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))


class Optimizer:
    """Policy and critic have one each, so that neither's gradient norm nor count of updates touches the other.

    Public attributes: ``peak`` (learning rate before the schedule) and ``updates`` (optimizer steps applied).
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], peak: float, settings: TrainerSettings) -> None:
        """``parameters``: this rank's shards by name. Weight decay spares vectors (norms and biases)."""
        self.peak = peak
        self.updates = 0
        self._parameters = dict(parameters)
        self._settings = settings
        self._adam = torch.optim.AdamW(
            [
                {"params": [p for p in parameters.values() if p.ndim > 1], "weight_decay": settings.weight_decay},
                {"params": [p for p in parameters.values() if p.ndim <= 1], "weight_decay": 0.0},
            ],
            lr=peak,
            betas=settings.betas,
            eps=settings.adam_epsilon,
            fused=True,
        )
        # Made now, so that a checkpoint can be loaded into it in place.
        for parameter in parameters.values():
            self._adam.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                **{moment: torch.zeros_like(parameter) for moment in MOMENTS},
            }

    def step(self, training_step: int) -> float:
        """Clip the gradients, update the weights, forget the gradients. All ranks call this together.

        An update whose gradient is not finite is left out.

        Returns:
            The gradient norm before clipping, over all ranks.
        """
        clipped = torch.nn.utils.clip_grad_norm_(self._parameters.values(), self._settings.grad_clip)
        norm = float(clipped.full_tensor() if isinstance(clipped, DTensor) else clipped)
        if math.isfinite(norm):
            for group in self._adam.param_groups:
                group["lr"] = learning_rate(training_step, self.peak, self._settings)
            self._adam.step()
            self.updates += 1
        else:
            logger.warning("step %d: gradient norm is %s, this update is skipped", training_step, norm)
        self.discard()
        return norm

    def discard(self) -> None:
        """Forget the gradients: weights and moments stay as they are."""
        self._adam.zero_grad(set_to_none=True)

    def moments(self) -> dict[str, Tensor]:
        """Both Adam moments as live (sharded) tensors, under ``<parameter>.exp_avg`` and ``<parameter>.exp_avg_sq``."""
        return {
            f"{name}.{moment}": self._adam.state[parameter][moment]
            for name, parameter in self._parameters.items()
            for moment in MOMENTS
        }

    def restore_updates(self, updates: int) -> None:
        """Continue counting from a checkpoint; Adam's own step counter is the number of updates."""
        self.updates = updates
        for state in self._adam.state.values():
            state["step"].fill_(float(updates))
