"""What loading a model may change about speed and memory changes nothing about what it computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from learner.adapters import LoraSettings
from learner.batch import MicroBatch, build_rows
from learner.loading import LoadSettings, load_policy
from learner.policy import Policy
from learner.samples import TrainSample
from learner.settings import TrainerSettings
from learner.sharding import shard
from learner.trainer import Trainer

SampleMaker = Callable[..., list[TrainSample]]
LORA = LoraSettings(rank=4, alpha=8.0)


def gradients(policy: Policy, batch: MicroBatch) -> dict[str, Tensor]:
    logprobs, entropy, _ = policy.score(batch, 0.9)
    (logprobs.square().sum() + entropy.sum()).backward()
    found: dict[str, Tensor] = {}
    for name, parameter in policy.named_shards().items():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.full_tensor()  # a DTensor
    return found


def count_layer_passes(policy: Policy) -> list[str]:
    """The list grows by one entry whenever the last decoder layer's attention runs."""
    passes: list[str] = []
    attention = policy.causal_lm.base_model.layers[-1].self_attn
    attention.register_forward_hook(lambda *_: passes.append("pass"))
    return passes


@pytest.mark.parametrize("share", [True, False])  # with and without an attention mask among the keyword arguments
@pytest.mark.parametrize("lora", [None, LORA])
def test_activation_checkpointing_computes_layers_again_and_the_same_gradient(
    mesh: DeviceMesh, model_dir: Path, make_samples: SampleMaker, share: bool, lora: LoraSettings | None
) -> None:
    batch = MicroBatch.from_rows(build_rows(make_samples(), 100, share))
    settings = LoadSettings(lora=lora)
    expected = gradients(load_policy(model_dir, mesh, settings), batch)
    policy = load_policy(model_dir, mesh, replace(settings, activation_checkpointing=True))
    passes = count_layer_passes(policy)
    actual = gradients(policy, batch)
    assert len(passes) == 2
    assert set(actual) == set(expected)
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name
    with torch.no_grad():
        policy.score(batch, 0.9)
    assert len(passes) == 3


@pytest.mark.parametrize("lora", [None, LORA])
def test_offload_trains_to_the_same_weights(
    mesh: DeviceMesh, model_dir: Path, make_samples: SampleMaker, lora: LoraSettings | None
) -> None:
    """On CPU ranks nothing travels, but FSDP's own path for offloaded shards runs."""
    settings = TrainerSettings(lr=0.01, kl_coef=0.1, micro_batch_tokens=64, minibatches=2, lora=lora)
    trainers = [Trainer(replace(settings, offload=offload), model_dir, mesh) for offload in ("none", "optimizer")]
    offloaded = []
    for trainer in trainers:
        trainer.step(make_samples())
        units = [module for module in trainer.policy.modules() if hasattr(module, "_get_fsdp_state")]
        assert len(units) == 3  # two layers and the root
        groups = [unit._get_fsdp_state()._fsdp_param_group for unit in units]
        offloaded.append({param.offload_to_cpu for group in groups for param in group.fsdp_params})
    assert offloaded == [{False}, {True}]
    expected, actual = (trainer.full_state_dict() for trainer in trainers)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_compiled_layers_give_the_gradient_of_plain_ones(
    mesh: DeviceMesh, model_dir: Path, make_samples: SampleMaker
) -> None:
    settings = LoadSettings(lora=LORA, activation_checkpointing=True)
    batch = MicroBatch.from_rows(build_rows(make_samples(), 100))
    expected = gradients(load_policy(model_dir, mesh, settings), batch)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    policy = load_policy(model_dir, mesh, replace(settings, compile=True))
    actual = gradients(policy, batch)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-3, atol=1e-3)  # gradients up to 100
    plain = policy.reference_logprobs(batch, 0.9)  # the same code with the adapters off
    torch.testing.assert_close(
        plain, load_policy(model_dir, mesh, trainable=False).reference_logprobs(batch, 0.9), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compute_dtype": "float8"}, "unknown compute_dtype 'float8': choose one of float32"),
        ({"offload": "weights"}, "unknown offload 'weights': choose one of none, optimizer"),
    ],
)
def test_unknown_values_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoadSettings(**changes)


def test_a_mesh_of_three_dimensions_and_an_unknown_offload_are_refused(mesh: DeviceMesh) -> None:
    with pytest.raises(ValueError, match=r"pass \(shard\) or \(replicate, shard\)"):
        shard(torch.nn.Linear(2, 2), [], init_device_mesh("cpu", (1, 1, 1)))
    with pytest.raises(ValueError, match="unknown offload 'disk'"):
        shard(torch.nn.Linear(2, 2), [], mesh, offload="disk")
