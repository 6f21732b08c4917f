"""One training step: scored groups in, updated weights and the step's figures out."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from learner.advantages import ADVANTAGES
from learner.batch import (
    MicroBatch,
    TrainSample,
    build_rows,
    check_sample,
    micro_batches,
    partition,
    shuffle_groups,
)
from learner.distributed import all_reduce, scatter_samples
from learner.loading import load_policy, load_reference
from learner.losses import KL_ESTIMATORS, LOSSES, PolicyTerms, StepTotals, token_weights, weighted_sum
from learner.policy import Policy
from learner.settings import TrainerSettings, learning_rate
from learner.step_metrics import StepMetrics

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Minibatch:
    """What one optimizer step reads on this rank; every rank has the same number of micro-batches."""

    batches: list[MicroBatch]
    totals: StepTotals


class Trainer:
    """Policy, optimizer and reference model of one run. All ranks make one and call its methods together.

    Public attributes: ``settings``, ``mesh``, ``policy``, ``optimizer``, ``steps`` (training steps done) and
    ``updates`` (optimizer steps applied).
    """

    def __init__(self, settings: TrainerSettings, model_dir: str | Path, mesh: DeviceMesh) -> None:
        """Load the policy from ``model_dir`` and, if ``kl_coef`` > 0, the reference (see ``load_reference``).

        Raises:
            FileNotFoundError: the folder holds no model.
        """
        self.settings = settings
        self.mesh = mesh
        loading = settings.load_settings()
        self.policy = load_policy(model_dir, mesh, loading)
        self.reference: Policy | None = None
        if settings.kl_coef > 0:
            self.reference = load_reference(self.policy, model_dir, mesh, loading)
        self.optimizer = _build_optimizer(self.policy, settings)
        self.steps = 0
        self.updates = 0
        # Attention costs 4 S H per token and layer, the linear layers about 24 H^2: beyond S = 6 H a shared
        # row would lose in attention to masked keys what it saves by computing the prompt once.
        self._row_tokens = settings.max_row_tokens or 6 * int(self.policy.config.hidden_size)

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, the one that gets samples and full weights."""
        return self.mesh.get_rank() == 0

    def step(self, samples: Sequence[TrainSample] | None) -> dict[str, float]:
        """Train once on the whole batch: rank 0 passes it, the others pass None. Fills the samples' advantages.

        Returns:
            The step's figures, the same on every rank: see ``StepMetrics.report``, plus grad_norm (mean over
            updates), lr, samples, skipped_updates, advantage_std, seconds and tokens_per_second.

        Raises:
            ValueError: a sample cannot be trained on, or there are fewer samples than minibatches.
        """
        started = time.perf_counter()
        if self.leads:
            self._check(samples or [])
            fill_advantages(samples or [], self.settings.advantage)
        minibatches = [self._lay_out(share) for share in self._cut(samples)]
        proximal = self._proximal(minibatches)
        metrics = StepMetrics()
        norms = [self._update(batch, known, metrics) for batch, known in zip(minibatches, proximal, strict=True)]
        self.steps += 1
        return self._report(metrics, minibatches, norms, started)

    def full_state_dict(self) -> dict[str, Tensor]:
        """See ``Policy.full_state_dict``."""
        return self.policy.full_state_dict()

    def named_tensors(self) -> dict[str, Tensor]:
        """Everything a checkpoint keeps as tensors: weights and both Adam moments, as live (sharded) tensors."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.policy.named_shards().items():
            tensors[f"model.{name}"] = parameter.detach()
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"optimizer.{name}.{moment}"] = self.optimizer.state[parameter][moment]
        return tensors

    def restore_counters(self, steps: int, updates: int) -> None:
        """Continue counting from a checkpoint; Adam's own step counter is the number of updates."""
        self.steps, self.updates = steps, updates
        for state in self.optimizer.state.values():
            state["step"].fill_(float(updates))

    def _check(self, samples: Sequence[TrainSample]) -> None:
        if len(samples) < max(self.settings.minibatches, 1):
            raise ValueError(f"{len(samples)} samples cannot be cut into {self.settings.minibatches} minibatches")
        for sample in samples:
            check_sample(sample, int(self.policy.config.vocab_size))

    def _cut(self, samples: Sequence[TrainSample] | None) -> list[list[TrainSample]]:
        """This rank's share of each minibatch. Minibatches are cut before ranks: they do not depend on the ranks."""
        count = self.settings.minibatches
        parts: Sequence[Sequence[TrainSample] | None] = [None] * count
        if self.leads and samples is not None:
            shuffled = shuffle_groups(samples, (self.settings.seed, self.steps)) if count > 1 else samples
            parts = partition(shuffled, count)
        return [scatter_samples(part) for part in parts]

    def _lay_out(self, share: Sequence[TrainSample]) -> Minibatch:
        row_tokens = min(self._row_tokens, self.settings.micro_batch_tokens)
        batches = micro_batches(
            build_rows(share, row_tokens, self.settings.share_prompts), self.settings.micro_batch_tokens
        )
        tokens, sequences = all_reduce([sum(len(sample.response_ids) for sample in share), len(share)])
        # Every forward pass is a collective operation: ranks with less to do run placeholders.
        (most,) = all_reduce([len(batches)], maximum=True)
        batches += [MicroBatch.placeholder() for _ in range(int(most) - len(batches))]
        return Minibatch(batches, StepTotals(tokens, sequences))

    def _proximal(self, minibatches: Sequence[Minibatch]) -> list[list[Tensor | None]]:
        """Log-probabilities under the policy at the start of the step, [N] per micro-batch.

        None where the current ones serve: with a single minibatch the first forward pass is the proximal
            policy.
        """
        if len(minibatches) == 1:
            return [[None] * len(minibatches[0].batches)]
        return [[self._score(self.policy, batch) for batch in minibatch.batches] for minibatch in minibatches]

    @torch.no_grad()
    def _score(self, policy: Policy, batch: MicroBatch) -> Tensor:
        return policy.response_logprobs(batch.to(policy.device), self.settings.temperature)[0]

    def _update(self, minibatch: Minibatch, proximal: Sequence[Tensor | None], metrics: StepMetrics) -> float:
        """One optimizer step; returns the gradient norm before clipping."""
        sharded = cast(FSDPModule, self.policy)
        for index, (batch, known) in enumerate(zip(minibatch.batches, proximal, strict=True), start=1):
            sharded.set_requires_gradient_sync(index == len(minibatch.batches))
            objective = self._objective(batch.to(self.policy.device), known, minibatch.totals, metrics)
            # FSDP averages gradients over ranks; the weights already divide by the step's totals, so undo
            # that.
            torch.autograd.backward(objective * self.mesh.size())
        norm = _clip_gradients(self.policy.named_shards().values(), self.settings.grad_clip)
        if math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.steps, self.settings)
            self.optimizer.step()
            self.updates += 1
        else:
            logger.warning("step %d: gradient norm is %s, this update is skipped", self.steps, norm)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _objective(
        self, batch: MicroBatch, proximal: Tensor | None, totals: StepTotals, metrics: StepMetrics
    ) -> Tensor:
        """This micro-batch's share of the step's loss: sum_t w_t (policy_t + kl_coef KL_t - entropy_coef H_t)."""
        settings = self.settings
        logprobs, entropy = self.policy.response_logprobs(batch, settings.temperature)
        terms = PolicyTerms(
            logprobs, logprobs.detach() if proximal is None else proximal, batch.behaviour, batch.advantages
        )
        losses = LOSSES[settings.loss](terms, settings.loss_settings())
        weights = token_weights(batch.lengths, totals, settings.denominator, settings.max_response_tokens)
        per_token, kl = losses.losses, torch.zeros_like(entropy)
        if self.reference is not None:
            kl = KL_ESTIMATORS[settings.kl_estimator](
                logprobs, self.reference.reference_logprobs(batch, settings.temperature)
            )
            per_token = per_token + settings.kl_coef * kl
        if settings.entropy_coef:
            per_token = per_token - settings.entropy_coef * entropy
        if batch.responses == 0:
            return weighted_sum(per_token, torch.zeros_like(weights))
        objective = weighted_sum(per_token, weights)
        metrics.add(terms, losses, entropy, kl, weights, objective, settings.importance_cap, batch.input_tokens)
        return objective

    def _report(
        self, metrics: StepMetrics, minibatches: Sequence[Minibatch], norms: Sequence[float], started: float
    ) -> dict[str, float]:
        report = metrics.report(len(minibatches))
        finite = [norm for norm in norms if math.isfinite(norm)]
        seconds = time.perf_counter() - started
        return report | {
            "grad_norm": sum(finite) / len(finite) if finite else math.nan,
            "skipped_updates": float(len(norms) - len(finite)),
            "lr": learning_rate(self.steps - 1, self.settings),
            "samples": sum(minibatch.totals.sequences for minibatch in minibatches),
            "seconds": seconds,
            "tokens_per_second": report["tokens"] / seconds,
        }


def fill_advantages(samples: Sequence[TrainSample], advantage: str) -> None:
    """Set ``advantage`` of every sample from the rewards of its group.

    Args:
        samples: the whole training step, so that every group is complete.
        advantage: a name in ``learner.advantages.ADVANTAGES``.
    """
    rewards = torch.tensor([sample.reward for sample in samples], dtype=torch.float64)
    groups = torch.tensor([sample.group for sample in samples], dtype=torch.int64)
    for sample, value in zip(samples, ADVANTAGES[advantage](rewards, groups).tolist(), strict=True):
        sample.advantage = value


def _build_optimizer(policy: Policy, settings: TrainerSettings) -> torch.optim.AdamW:
    """AdamW with its state already there, so that a checkpoint can be loaded into it in place."""
    parameters = list(policy.named_shards().values())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.adam_epsilon, fused=True)
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def _clip_gradients(parameters: Iterable[Tensor], largest: float) -> float:
    norm = torch.nn.utils.clip_grad_norm_(parameters, largest)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
