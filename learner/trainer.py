"""One training step: scored groups in, updated weights and the step's figures out.

The step does not know which algorithm runs. It scores the responses once with every model that the settings
call for, lets `learner.experience` turn that into advantages and returns, and updates policy and critic on the
objectives of `learner.objective`, minibatch after minibatch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from learner.balance import CostModel, partition, shuffle_groups
from learner.batch import MicroBatch, build_rows, micro_batches
from learner.critic import Critic, load_critic
from learner.distributed import all_reduce, scatter_samples
from learner.experience import PROXIMAL, REFERENCE, VALUES, Experience, Streams, collect_experience
from learner.loading import load_policy, load_reference
from learner.losses import StepTotals
from learner.objective import policy_objective, value_objective
from learner.optimizer import Optimizer, learning_rate
from learner.policy import Policy
from learner.samples import TrainSample, check_sample
from learner.settings import TrainerSettings
from learner.step_metrics import StepMetrics


@dataclass(frozen=True)
class Minibatch:
    """What one update reads on this rank; every rank has the same number of micro-batches."""

    samples: list[TrainSample]
    batches: list[MicroBatch]
    totals: StepTotals


class Norms(NamedTuple):
    """Gradient norms of a step's updates before clipping, in their order."""

    policy: list[float]
    critic: list[float]


class Trainer:
    """Policy, critic, reference model and optimizers of one run. All ranks make one and call its methods together.

    Public attributes: ``settings``, ``mesh``, ``policy``, ``critic`` and ``reference`` (None where the algorithm
    has none; a shared critic is the policy's value head), ``optimizer`` (the policy's), ``critic_optimizer`` and
    ``steps`` (training steps done, which is the version of the policy).
    """

    def __init__(self, settings: TrainerSettings, model_dir: str | Path, mesh: DeviceMesh) -> None:
        """Load policy and separate critic from ``model_dir`` and, if ``kl_coef`` > 0, the reference (see
        ``load_reference``).

        Raises:
            FileNotFoundError: the folder holds no model.
        """
        self.settings = settings
        self.mesh = mesh
        loading = settings.load_settings()
        self.policy = load_policy(model_dir, mesh, loading, value_head=settings.critic == "shared")
        self.critic: Critic | None = None
        if settings.critic == "separate":
            self.critic = load_critic(model_dir, mesh, loading)
        self.reference: Policy | None = None
        if settings.kl_coef > 0:
            self.reference = load_reference(self.policy, model_dir, mesh, loading)
        self.optimizer = Optimizer(self.policy.named_shards(), settings.lr, settings)
        self.critic_optimizer: Optimizer | None = None
        if settings.critic != "none":
            self.critic_optimizer = Optimizer(self._critic_shards(), settings.critic_lr, settings)
        self.steps = 0
        self._cost = CostModel.of_model(self.policy.config, settings.share_prompts)

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, the one that gets samples and full weights."""
        return self.mesh.get_rank() == 0

    def step(self, samples: Sequence[TrainSample] | None) -> dict[str, float]:
        """Train once on the whole batch: rank 0 passes it, the others pass None. Numbers the samples.

        Returns:
            The step's figures, the same on every rank: see ``StepMetrics.report`` and
            ``learner.experience.collect_experience``, plus grad_norm (mean over updates), critic_grad_norm, lr,
            critic_lr, samples, skipped_updates, seconds and tokens_per_second.

        Raises:
            ValueError: a sample cannot be trained on, or there are fewer samples than minibatches.
        """
        started = time.perf_counter()
        if self.leads:
            self._check(samples or [])
        minibatches = [self._lay_out(share) for share in self._cut(samples)]
        experience = self._look(minibatches)
        metrics = StepMetrics()
        norms = self._update(minibatches, experience, metrics)
        self.steps += 1
        report = metrics.report(len(minibatches)) | experience.figures | self._describe_updates(norms)
        seconds = time.perf_counter() - started
        return report | {
            "samples": sum(minibatch.totals.sequences for minibatch in minibatches),
            "seconds": seconds,
            "tokens_per_second": report["tokens"] / seconds,
        }

    # ------------------------------------------------------------------ state

    def full_state_dict(self) -> dict[str, Tensor]:
        """What actors load: the policy without critic. See ``Policy.full_state_dict``."""
        return self.policy.full_state_dict()

    def named_tensors(self) -> dict[str, Tensor]:
        """Everything a checkpoint keeps as tensors, live (sharded): weights and Adam moments of policy and critic."""
        tensors = {f"model.{name}": shard.detach() for name, shard in self.policy.named_shards().items()}
        tensors |= {f"optimizer.{name}": moment for name, moment in self.optimizer.moments().items()}
        if self.critic_optimizer is not None:
            tensors |= {f"critic.{name}": shard.detach() for name, shard in self._critic_shards().items()}
            tensors |= {f"critic_optimizer.{name}": moment for name, moment in self.critic_optimizer.moments().items()}
        return tensors

    def counters(self) -> tuple[int, int, int]:
        """Steps, and updates of policy and critic, as ``restore_counters`` takes them."""
        critic_updates = 0 if self.critic_optimizer is None else self.critic_optimizer.updates
        return self.steps, self.optimizer.updates, critic_updates

    def restore_counters(self, steps: int, updates: int, critic_updates: int) -> None:
        """Continue counting from a checkpoint."""
        self.steps = steps
        self.optimizer.restore_updates(updates)
        if self.critic_optimizer is not None:
            self.critic_optimizer.restore_updates(critic_updates)

    def _critic_shards(self) -> dict[str, nn.Parameter]:
        if self.critic is not None:
            return self.critic.named_shards()
        assert self.policy.value_head is not None
        return dict(self.policy.value_head.named_parameters(prefix="head"))

    # ------------------------------------------------------------------ the batch

    def _check(self, samples: Sequence[TrainSample]) -> None:
        if len(samples) < max(self.settings.minibatches, 1):
            raise ValueError(f"{len(samples)} samples cannot be cut into {self.settings.minibatches} minibatches")
        for index, sample in enumerate(samples):
            check_sample(sample, int(self.policy.config.vocab_size))
            sample.index = index

    def _cut(self, samples: Sequence[TrainSample] | None) -> list[list[TrainSample]]:
        """This rank's share of each minibatch. Minibatches are cut before ranks: they do not depend on the ranks."""
        count = self.settings.minibatches
        parts: Sequence[Sequence[TrainSample] | None] = [None] * count
        if self.leads and samples is not None:
            shuffled = shuffle_groups(samples, (self.settings.seed, self.steps)) if count > 1 else samples
            parts = partition(shuffled, count, self._cost)
        return [scatter_samples(part, self._cost) for part in parts]

    def _lay_out(self, share: list[TrainSample]) -> Minibatch:
        budget = self.settings.micro_batch_tokens
        batches = micro_batches(build_rows(share, budget, self.settings.share_prompts), budget)
        tokens, sequences = all_reduce([sum(len(sample.response_ids) for sample in share), len(share)])
        # Every forward pass is a collective operation: ranks with less to do run placeholders.
        (most,) = all_reduce([len(batches)], maximum=True)
        batches += [MicroBatch.placeholder() for _ in range(int(most) - len(batches))]
        return Minibatch(share, batches, StepTotals(tokens, sequences))

    # ------------------------------------------------------------------ before the updates

    def _look(self, minibatches: Sequence[Minibatch]) -> Experience:
        batches = [batch for minibatch in minibatches for batch in minibatch.batches]
        samples = [sample for minibatch in minibatches for sample in minibatch.samples]
        return collect_experience(batches, samples, self._score, self.settings)

    @torch.no_grad()
    def _score(self, batch: MicroBatch) -> dict[str, Tensor]:
        """What the models say of one micro-batch, float32 [N] each: only what this step will read."""
        batch = batch.to(self.policy.device)
        streams: dict[str, Tensor] = {}
        if self._scores_policy:
            scores = self.policy.score(batch, self.settings.temperature)
            streams[PROXIMAL] = scores.logprobs
            if scores.values is not None:
                streams[VALUES] = scores.values
        if self.reference is not None:
            streams[REFERENCE] = self.reference.reference_logprobs(batch, self.settings.temperature)
        if self.critic is not None:
            streams[VALUES] = self.critic.values(batch)
        return streams

    @property
    def _scores_policy(self) -> bool:
        """Whether the policy is run once more before the updates.

        With a single minibatch the first forward pass of the update is the proximal policy itself.
        """
        settings = self.settings
        reads_proximal = settings.minibatches > 1 or settings.kl_in == "reward"
        return (reads_proximal and settings.proximal == "recompute") or settings.critic == "shared"

    # ------------------------------------------------------------------ updates

    def _update(self, minibatches: Sequence[Minibatch], experience: Experience, metrics: StepMetrics) -> Norms:
        """All optimizer steps of policy and critic; returns the gradient norms before clipping."""
        norms = Norms([], [])
        for minibatch in minibatches:
            self._update_policy(minibatch, experience, metrics, norms)
        if self.critic is not None:
            for minibatch in [*minibatches] * self.settings.critic_epochs:
                self._accumulate(self.critic, self._critic_loss, minibatch, experience, metrics)
                norms.critic.append(self._critic_step())
        return norms

    def _update_policy(self, minibatch: Minibatch, experience: Experience, metrics: StepMetrics, norms: Norms) -> None:
        """One optimizer step of the policy, and of the value head where it has one."""
        warming_up = self.steps < self.settings.critic_warmup_steps
        if warming_up and self.critic is not None:
            # Nothing is updated here: the figures of the step need no gradient.
            with torch.no_grad():
                for batch in minibatch.batches:
                    on_device = batch.to(self.policy.device)
                    self._policy_loss(on_device, experience.of(on_device), minibatch.totals, metrics)
            return
        self._accumulate(self.policy, self._policy_loss, minibatch, experience, metrics)
        if warming_up:
            self.optimizer.discard()
        else:
            norms.policy.append(self.optimizer.step(self.steps))
        if self.settings.critic == "shared":
            norms.critic.append(self._critic_step())

    def _accumulate(
        self,
        model: nn.Module,
        loss: Callable[[MicroBatch, Streams, StepTotals, StepMetrics], Tensor],
        minibatch: Minibatch,
        experience: Experience,
        metrics: StepMetrics,
    ) -> None:
        """Add up the gradients of ``loss`` over the micro-batches; ranks exchange them once, at the last."""
        for index, batch in enumerate(minibatch.batches, start=1):
            cast(FSDPModule, model).set_requires_gradient_sync(index == len(minibatch.batches))
            on_device = batch.to(self.policy.device)
            share = loss(on_device, experience.of(on_device), minibatch.totals, metrics)
            # FSDP averages gradients over ranks; the losses already divide by the step's totals, so undo that.
            torch.autograd.backward(share * self.mesh.size())

    def _policy_loss(self, batch: MicroBatch, streams: Streams, totals: StepTotals, metrics: StepMetrics) -> Tensor:
        settings = self.settings
        scores = self.policy.score(batch, settings.temperature)
        loss = policy_objective(scores, batch, streams, totals, self.steps, settings, metrics)
        if scores.values is None:
            return loss
        return loss + settings.value_coef * value_objective(scores.values, batch, streams, totals, settings, metrics)

    def _critic_loss(self, batch: MicroBatch, streams: Streams, totals: StepTotals, metrics: StepMetrics) -> Tensor:
        assert self.critic is not None
        return value_objective(self.critic.values(batch), batch, streams, totals, self.settings, metrics)

    def _critic_step(self) -> float:
        assert self.critic_optimizer is not None
        return self.critic_optimizer.step(self.steps)

    def _describe_updates(self, norms: Norms) -> dict[str, float]:
        """Mean gradient norms, learning rates, and the number of updates that were left out."""
        step, settings = self.steps - 1, self.settings
        figures = {
            "skipped_updates": float(sum(not math.isfinite(norm) for norm in (*norms.policy, *norms.critic))),
            "grad_norm": _finite_mean(norms.policy),
            "lr": learning_rate(step, settings.lr, settings),
        }
        if self.critic_optimizer is not None:
            figures["critic_grad_norm"] = _finite_mean(norms.critic)
            figures["critic_lr"] = learning_rate(step, settings.critic_lr, settings)
        return figures


def _finite_mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
