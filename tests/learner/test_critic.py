"""PPO with a critic: against plain PyTorch, what the critic learns, and who sees its weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

from learner.balance import CostModel, partition, shuffle_groups
from learner.samples import TrainSample
from learner.settings import TrainerSettings
from learner.trainer import Trainer
from tests.learner.plain_ppo import PlainPPO

SampleMaker = Callable[..., list[TrainSample]]
KINDS = ["separate", "shared"]
PPO: dict[str, Any] = {
    "advantage": "gae",
    "loss": "ppo_clip",
    "kl_in": "reward",
    "kl_estimator": "k1",
    "micro_batch_tokens": 64,
}


def one_token_samples(seed: int, prompts: int = 8, size: int = 8) -> list[TrainSample]:
    """Random one-token answers to prompts of one of two kinds, which alone decides the reward."""
    rng = np.random.default_rng(seed)
    samples = []
    for group in range(prompts):
        kind = int(rng.integers(2))
        prompt = np.array([20 + kind, *rng.integers(100, 200, 3), 20 + kind], dtype=np.int32)
        for token in rng.integers(200, 300, size):
            answer, logprob = np.array([token], dtype=np.int32), np.array([-5.0], dtype=np.float32)
            samples.append(TrainSample(prompt, answer, logprob, np.zeros(1, dtype=np.int32), 3.0 * kind - 1.0, group))
    return samples


@pytest.mark.parametrize(
    ("critic", "minibatches", "changes"),
    [
        ("separate", 1, {}),
        ("separate", 3, {}),
        ("shared", 1, {}),
        ("shared", 3, {"critic_lambda": 1.0}),
        ("separate", 1, {"critic_epochs": 4, "critic_lambda": 1.0}),
        ("separate", 3, {"critic_epochs": 2}),
    ],
)
def test_steps_are_those_of_plain_pytorch(
    mesh: DeviceMesh,
    model_dir: Path,
    make_samples: SampleMaker,
    critic: str,
    minibatches: int,
    changes: dict[str, Any],
) -> None:
    settings = TrainerSettings(
        **PPO,
        critic=critic,
        minibatches=minibatches,
        # Epsilon makes updates nearly proportional to gradients: errors show in their true size.
        adam_epsilon=1.0,
        lr=0.3,
        critic_lr=0.2,
        grad_clip=5.0,
        weight_decay=0.0,
        gamma=0.97,
        gae_lambda=0.9,
        kl_coef=0.2,
        value_clip=0.05,
        value_coef=0.3,
        **changes,
    )
    trainer, plain = Trainer(settings, model_dir, mesh), PlainPPO(settings, model_dir)
    for step in range(3):
        samples = make_samples(seed=step)
        place = {id(sample): index for index, sample in enumerate(samples)}
        shuffled = samples if minibatches == 1 else shuffle_groups(samples, (0, step))
        cuts = [
            [place[id(sample)] for sample in part]
            for part in partition(shuffled, minibatches, CostModel.of_model(plain.model.config))
        ]
        plain.step(samples, cuts)
        figures = trainer.step(samples)
    assert figures["critic_grad_norm"] > 0
    if minibatches > 1:
        assert figures["clip_fraction"] > 0
        assert figures["value_clip_fraction"] > 0
    for name, expected in plain.model.named_parameters():
        torch.testing.assert_close(trainer.full_state_dict()[name], expected.detach(), atol=2e-5, rtol=0)
    tensors = trainer.named_tensors()
    torch.testing.assert_close(
        tensors["critic.head.linear.weight"].full_tensor(), plain.head.weight.detach(), atol=2e-5, rtol=0
    )
    if critic == "separate":
        for name, expected in plain.backbone.named_parameters():
            ours = tensors[f"critic.backbone.{name}"].full_tensor()
            torch.testing.assert_close(ours, expected.detach(), atol=2e-5, rtol=0)


@pytest.mark.parametrize("critic", KINDS)
def test_a_critic_learns_to_explain_the_returns(mesh: DeviceMesh, model_dir: Path, critic: str) -> None:
    settings = TrainerSettings(**PPO, critic=critic, critic_lr=0.01, lr=1e-3, kl_coef=0.001, value_coef=1.0)
    trainer = Trainer(settings, model_dir, mesh)
    figures = [trainer.step(one_token_samples(seed)) for seed in range(25)]
    assert abs(figures[0]["explained_variance"]) < 1e-6, "a value head that starts at 0 explains nothing"
    assert figures[-1]["explained_variance"] > 0.8
    assert figures[-1]["value_loss"] < 0.2 * figures[0]["value_loss"]
    assert figures[-1]["values_mean"] == pytest.approx(figures[-1]["returns_mean"], abs=0.5)
    assert all(math.isfinite(value) for report in figures for value in report.values())


def test_more_passes_of_the_critic_explain_more_of_the_next_step(mesh: DeviceMesh, model_dir: Path) -> None:
    explained = {}
    for passes in (1, 4):
        settings = TrainerSettings(**PPO, critic="separate", critic_lr=0.002, critic_epochs=passes, kl_coef=0.001)
        trainer = Trainer(settings, model_dir, mesh)
        figures = [trainer.step(one_token_samples(seed)) for seed in range(8)]
        explained[passes] = figures[-1]["explained_variance"]
        assert trainer.counters() == (8, 8, 8 * passes)
        assert figures[0]["value_loss"] == pytest.approx(0.5 * 2.25, rel=0.7), "a mean over the passes, not their sum"
    assert explained[4] > explained[1] + 0.1


@pytest.mark.parametrize("critic", KINDS)
def test_warm_up_trains_the_critic_alone(
    mesh: DeviceMesh, model_dir: Path, make_samples: SampleMaker, critic: str
) -> None:
    settings = TrainerSettings(**PPO, critic=critic, critic_warmup_steps=2, critic_lr=0.1, lr=0.1, minibatches=2)
    trainer = Trainer(settings, model_dir, mesh)
    start = trainer.full_state_dict()
    for step in range(2):
        trainer.step(make_samples(seed=step))
    assert all(torch.equal(tensor, start[name]) for name, tensor in trainer.full_state_dict().items())
    assert trainer.counters() == (2, 0, 4)
    assert trainer.named_tensors()["critic.head.linear.weight"].full_tensor().abs().sum() > 0
    moments = [tensor for name, tensor in trainer.named_tensors().items() if name.startswith("optimizer.")]
    assert all(float(tensor.full_tensor().abs().max()) == 0.0 for tensor in moments)
    trainer.step(make_samples(seed=2))
    assert trainer.counters() == (3, 2, 6)
    assert not all(torch.equal(tensor, start[name]) for name, tensor in trainer.full_state_dict().items())


@pytest.mark.parametrize("critic", KINDS)
def test_actors_get_the_policy_alone(mesh: DeviceMesh, model_dir: Path, critic: str) -> None:
    plain = Trainer(TrainerSettings(kl_coef=0.0), model_dir, mesh)
    with_critic = Trainer(TrainerSettings(**(PPO | {"kl_in": "loss"}), critic=critic, kl_coef=0.0), model_dir, mesh)
    assert set(with_critic.full_state_dict()) == set(plain.full_state_dict())
    assert any(name.startswith("critic.head") for name in with_critic.named_tensors())


def test_values_are_float32_where_the_backbone_computes_in_bfloat16(mesh: DeviceMesh, model_dir: Path) -> None:
    for critic in KINDS:
        settings = TrainerSettings(**PPO, critic=critic, critic_lr=0.01, compute_dtype="bfloat16")
        trainer = Trainer(settings, model_dir, mesh)
        figures = [trainer.step(one_token_samples(0)) for _ in range(4)]
        assert figures[-1]["value_loss"] < figures[0]["value_loss"]
        head = trainer.policy.value_head if trainer.critic is None else trainer.critic.head
        assert head is not None
        assert head(torch.ones(2, 64, dtype=torch.bfloat16)).dtype == torch.float32


def test_a_policy_that_rests_has_figures_and_no_backward_pass(
    mesh: DeviceMesh, model_dir: Path, make_samples: SampleMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = TrainerSettings(**PPO, critic="separate", critic_warmup_steps=1)
    trainer = Trainer(settings, model_dir, mesh)
    monkeypatch.setattr(trainer.optimizer, "discard", lambda: pytest.fail("there was a gradient to throw away"))
    resting = trainer.step(make_samples(seed=0))
    assert all(shard.grad is None for shard in trainer.policy.named_shards().values())
    active = Trainer(replace(settings, critic_warmup_steps=0), model_dir, mesh).step(make_samples(seed=0))
    assert math.isnan(resting["grad_norm"])
    for name in ("loss", "policy_loss", "value_loss", "entropy", "ess", "ratio_mean", "kl_ref", "tokens"):
        assert resting[name] == pytest.approx(active[name], rel=1e-5, abs=1e-7), name


def test_gae_and_a_critic_need_each_other() -> None:
    settings = TrainerSettings()
    with pytest.raises(ValueError, match="gae needs one"):
        replace(settings, advantage="gae")
    with pytest.raises(ValueError, match="do not go together"):
        replace(settings, critic="shared")
    for critic in ("none", "shared"):
        with pytest.raises(ValueError, match="critic_epochs 2 needs critic separate"):
            replace(settings, advantage="gae" if critic == "shared" else "grpo", critic=critic, critic_epochs=2)
