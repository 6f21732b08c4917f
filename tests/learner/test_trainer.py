"""The training step against a plain PyTorch one, its independence of batching, and learning."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM

from learner.samples import TrainSample
from learner.settings import TrainerSettings
from learner.trainer import Trainer

SampleMaker = Callable[..., list[TrainSample]]
# A large epsilon makes Adam's update nearly proportional to the gradient, so that weights show gradient
# errors in their true size instead of the sign of noise.
PROPORTIONAL: dict[str, Any] = {"lr": 0.1, "adam_epsilon": 1.0, "micro_batch_tokens": 64}


def weights_after(
    mesh: DeviceMesh, model_dir: Path, samples: list[TrainSample], steps: int = 1, **changes: Any
) -> dict[str, Tensor]:
    trainer = Trainer(TrainerSettings(**(PROPORTIONAL | changes)), model_dir, mesh)
    for _ in range(steps):
        trainer.step(samples)
    return trainer.full_state_dict()


def assert_same_weights(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float) -> None:
    assert set(first) == set(second)
    for name in first:
        difference = float((first[name] - second[name]).detach().abs().max())
        assert difference <= tolerance, f"{name} differs by {difference}"


def standardised_in_groups(samples: list[TrainSample]) -> list[float]:
    members: dict[int, list[float]] = {}
    for sample in samples:
        members.setdefault(sample.group, []).append(sample.reward)
    return [
        (sample.reward - float(np.mean(members[sample.group]))) / (float(np.std(members[sample.group])) + 1e-6)
        for sample in samples
    ]


def reference_objective(
    model: torch.nn.Module, frozen: torch.nn.Module, samples: list[TrainSample], settings: TrainerSettings
) -> Tensor:
    """Decoupled PPO + k3 KL - entropy, sequence mean, one sample at a time; written without the learner's
    code.
    """
    total = torch.zeros(())
    for sample, advantage in zip(samples, standardised_in_groups(samples), strict=True):
        prompt = torch.from_numpy(sample.prompt_ids).long()
        response = torch.from_numpy(sample.response_ids).long()
        ids = torch.cat([prompt, response])[None]
        window = slice(len(prompt) - 1, -1)
        table = (model(ids).logits[0, window] / settings.temperature).log_softmax(-1)
        with torch.no_grad():
            frozen_table = (frozen(ids).logits[0, window] / settings.temperature).log_softmax(-1)
        picked, anchor = table.gather(1, response[:, None])[:, 0], frozen_table.gather(1, response[:, None])[:, 0]
        ratio = (picked - picked.detach()).exp()
        weight = (picked.detach() - torch.from_numpy(sample.behaviour_logprobs)).exp().clamp(max=2.0)
        difference = picked - anchor
        kl = (-difference).exp() - 1 + difference
        entropy = -(table.exp() * table).sum(-1)
        per_token = -weight * ratio * advantage + settings.kl_coef * kl - settings.entropy_coef * entropy
        total = total + per_token.mean() / len(samples)
    return total


def test_a_step_is_the_step_of_plain_pytorch(mesh: DeviceMesh, model_dir: Path, make_samples: SampleMaker) -> None:
    settings = TrainerSettings(
        **PROPORTIONAL,
        weight_decay=0.1,
        grad_clip=0.5,
        kl_coef=0.3,
        entropy_coef=0.05,
        temperature=0.8,
        denominator="sequence_mean",
    )
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    frozen = copy.deepcopy(model)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    spared = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": spared, "weight_decay": 0.0}],
        lr=0.1,
        eps=1.0,
        fused=False,
    )
    trainer = Trainer(settings, model_dir, mesh)
    for step in range(2):
        samples = make_samples(seed=step)
        metrics = trainer.step(samples)
        objective = reference_objective(model, frozen, samples, settings)
        optimizer.zero_grad()
        objective.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        assert metrics["loss"] == pytest.approx(objective.item(), rel=1e-4, abs=1e-6)
        assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
        assert float(norm) > 0.5
    assert_same_weights(trainer.full_state_dict(), dict(model.named_parameters()), tolerance=2e-5)


@pytest.mark.parametrize("denominator", ["token_mean", "sequence_mean", "constant"])
@pytest.mark.parametrize(
    "changes",
    [{"micro_batch_tokens": 20}, {"micro_batch_tokens": 10_000}, {"share_prompts": False}],
)
def test_gradients_do_not_depend_on_micro_batches(
    mesh: DeviceMesh, model_dir: Path, make_samples: SampleMaker, denominator: str, changes: dict[str, Any]
) -> None:
    samples = make_samples(seed=3)
    common = {"denominator": denominator, "max_response_tokens": 9}
    expected = weights_after(mesh, model_dir, samples, **common)
    assert_same_weights(weights_after(mesh, model_dir, samples, **common, **changes), expected, tolerance=1e-6)


def test_gradients_do_not_depend_on_the_order(mesh: DeviceMesh, model_dir: Path, make_samples: SampleMaker) -> None:
    samples = make_samples(seed=3)
    expected = weights_after(mesh, model_dir, samples)
    shuffled = [samples[index] for index in np.random.default_rng(0).permutation(len(samples))]
    assert_same_weights(weights_after(mesh, model_dir, shuffled), expected, tolerance=1e-6)


@pytest.mark.parametrize("minibatches", [1, 3])
def test_steps_are_deterministic(
    mesh: DeviceMesh, model_dir: Path, make_samples: SampleMaker, minibatches: int
) -> None:
    runs = [
        weights_after(mesh, model_dir, make_samples(), steps=3, minibatches=minibatches, adam_epsilon=1e-8)
        for _ in range(2)
    ]
    assert_same_weights(runs[0], runs[1], tolerance=0.0)


def test_minibatches_move_away_from_a_fixed_proximal_policy(
    mesh: DeviceMesh, model_dir: Path, make_samples: SampleMaker
) -> None:
    single = Trainer(TrainerSettings(lr=0.01), model_dir, mesh).step(make_samples())
    several = Trainer(TrainerSettings(lr=0.01, minibatches=3), model_dir, mesh)
    metrics = several.step(make_samples())
    assert (single["ratio_max"], single["clip_fraction"]) == (1.0, 0.0)
    assert metrics["ratio_max"] > 1.05
    assert metrics["clip_fraction"] > 0
    assert several.optimizer.updates == 3
    # The mismatch is measured against the proximal policy, which is the same in both runs.
    assert metrics["mismatch_kl"] == pytest.approx(single["mismatch_kl"], rel=1e-4)
    assert metrics["tokens"] == single["tokens"]


def test_metrics_describe_the_batch(mesh: DeviceMesh, model_dir: Path, make_samples: SampleMaker) -> None:
    samples = make_samples()
    trainer = Trainer(TrainerSettings(lr=1e-3, warmup_steps=2, kl_coef=0.1), model_dir, mesh)
    first, second = trainer.step(samples), trainer.step(samples)
    assert first["samples"] == len(samples)
    assert first["tokens"] == sum(len(sample.response_ids) for sample in samples)
    assert (first["lr"], second["lr"]) == (0.5e-3, 1e-3)
    assert first["kl_ref"] == pytest.approx(0.0, abs=1e-6)
    assert second["kl_ref"] > 1e-6
    assert 0 < first["entropy"] < math.log(512)
    assert 0 < first["ess"] <= 1
    assert first["mismatch_kl"] > 0
    assert all(math.isfinite(value) for value in first.values())


def test_behaviour_equal_to_the_policy_shows_no_mismatch(
    mesh: DeviceMesh, model_dir: Path, make_samples: SampleMaker
) -> None:
    samples = make_samples()
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    for sample in samples:
        ids = torch.from_numpy(np.concatenate([sample.prompt_ids, sample.response_ids])).long()
        with torch.no_grad():
            table = (model(ids[None]).logits[0, len(sample.prompt_ids) - 1 : -1] / 0.9).log_softmax(-1)
        response = torch.from_numpy(sample.response_ids).long()
        sample.behaviour_logprobs = table.gather(1, response[:, None])[:, 0].numpy()
    metrics = Trainer(TrainerSettings(temperature=0.9), model_dir, mesh).step(samples)
    assert metrics["mismatch_kl"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["importance_mean"] == pytest.approx(1.0, abs=1e-4)
    assert metrics["ess"] == pytest.approx(1.0, abs=1e-4)


def test_a_non_finite_gradient_skips_the_update(
    mesh: DeviceMesh, model_dir: Path, make_samples: SampleMaker, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = Trainer(TrainerSettings(kl_coef=0.0, advantage="dr_grpo"), model_dir, mesh)
    before = trainer.full_state_dict()
    samples = make_samples()
    samples[0].reward = 1e30  # finite, but the square of its gradient overflows float32
    metrics = trainer.step(samples)
    assert (metrics["skipped_updates"], trainer.optimizer.updates, trainer.steps) == (1.0, 0, 1)
    assert "this update is skipped" in caplog.text
    assert_same_weights(trainer.full_state_dict(), before, tolerance=0.0)


def test_too_few_samples_and_foreign_tokens_are_refused(
    mesh: DeviceMesh, model_dir: Path, make_samples: SampleMaker
) -> None:
    trainer = Trainer(TrainerSettings(minibatches=2, kl_coef=0.0), model_dir, mesh)
    with pytest.raises(ValueError, match="1 samples cannot be cut into 2 minibatches"):
        trainer.step(make_samples(groups=1, size=1))
    samples = make_samples()
    samples[1].response_ids = samples[1].response_ids + np.int32(600)
    with pytest.raises(ValueError, match="outside the vocabulary of 512"):
        trainer.step(samples)
