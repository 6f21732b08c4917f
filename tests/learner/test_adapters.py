"""LoRA against a plain peft model, and what leaves the learner when only adapters are trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM

from learner.adapters import LoraSettings, merge
from learner.batch import MicroBatch, build_rows
from learner.checkpoint import latest_valid, load_checkpoint, save_checkpoint
from learner.loading import LoadSettings, load_policy, load_reference
from learner.policy import Policy
from learner.samples import TrainSample
from learner.settings import TrainerSettings
from learner.snapshot import write_snapshot
from learner.trainer import Trainer

SampleMaker = Callable[..., list[TrainSample]]
LORA = LoraSettings(rank=4, alpha=6.0)
TRAINED = TrainerSettings(lr=0.01, kl_coef=0.1, lora=LORA, micro_batch_tokens=64)


def micro_batch(samples: list[TrainSample]) -> MicroBatch:
    return MicroBatch.from_rows(build_rows(samples, 100))


def shake(policy: Policy) -> None:
    """Give B values: as long as it is zero A has no gradient and merging changes nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for shard in policy.named_shards().values():
            local = shard.to_local()  # one rank holds it whole
            local.add_(torch.randn(local.shape, generator=generator) * 0.05)


def plain_objective(model: torch.nn.Module, samples: list[TrainSample]) -> Tensor:
    """sum over all response tokens of (log p)^2, one sample at a time."""
    total = torch.zeros(())
    for sample in samples:
        prompt, response = torch.from_numpy(sample.prompt_ids).long(), torch.from_numpy(sample.response_ids).long()
        table = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        total = total + table.gather(1, response[:, None]).square().sum()
    return total


def policy_objective(policy: Policy, samples: list[TrainSample]) -> Tensor:
    return policy.score(micro_batch(samples), 1.0).logprobs.square().sum()


def plain_peft(model_dir: Path, policy: Policy) -> torch.nn.Module:
    """peft's own wrapper around the model in ``model_dir``, with the policy's adapters."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    config = LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, target_modules="all-linear")
    wrapped = get_peft_model(model, config)
    weights = {f"base_model.model.{name}": full(shard) for name, shard in policy.named_shards().items()}
    missing = wrapped.load_state_dict(weights, strict=False)
    assert missing.unexpected_keys == []
    assert not [name for name in missing.missing_keys if "lora_" in name]
    return wrapped


def full(tensor: Tensor) -> Tensor:
    return tensor.detach().full_tensor()  # a DTensor


@pytest.mark.parametrize("reference_first", [False, True])
def test_gradients_are_those_of_a_plain_peft_model(
    mesh: DeviceMesh, model_dir: Path, make_samples: SampleMaker, reference_first: bool
) -> None:
    policy = load_policy(model_dir, mesh, LoadSettings(lora=LORA))
    shake(policy)
    samples = make_samples()
    if reference_first:  # a forward pass with the adapters off must not freeze them
        policy.reference_logprobs(micro_batch(samples), 1.0)
    objective = policy_objective(policy, samples)
    policy.reference_logprobs(micro_batch(samples), 1.0)  # between forward and backward pass
    objective.backward()
    plain = plain_peft(model_dir, policy)
    expected = plain_objective(plain, samples)
    expected.backward()
    torch.testing.assert_close(objective, expected, rtol=1e-5, atol=1e-3)
    wanted = {name.removeprefix("base_model.model."): p for name, p in plain.named_parameters() if p.requires_grad}
    assert set(policy.named_shards()) == set(wanted)
    for name, shard in policy.named_shards().items():
        assert shard.grad is not None
        assert wanted[name].grad is not None
        assert float(wanted[name].grad.abs().max()) > 0
        torch.testing.assert_close(full(shard.grad), wanted[name].grad, rtol=1e-4, atol=1e-3)
    assert all(p.grad is None for p in policy.causal_lm.parameters() if not p.requires_grad)


def test_published_weights_are_merged_under_the_original_names(
    mesh: DeviceMesh, model_dir: Path, tmp_path: Path, make_samples: SampleMaker
) -> None:
    policy = load_policy(model_dir, mesh, LoadSettings(lora=LORA))
    saved = load_file(model_dir / "model.safetensors")
    fresh = policy.full_state_dict()
    assert set(fresh) == set(saved)
    assert all(torch.equal(fresh[name], saved[name]) for name in saved)  # B is zero

    shake(policy)
    live = {name: full(parameter).clone() for name, parameter in policy.causal_lm.named_parameters()}
    merged = policy.full_state_dict()
    assert all(torch.equal(full(p), live[name]) for name, p in policy.causal_lm.named_parameters())
    layer = "model.layers.1.mlp.up_proj"
    up, down = live[f"{layer}.lora_B.default.weight"].double(), live[f"{layer}.lora_A.default.weight"].double()
    expected = saved[f"{layer}.weight"].double() + LORA.alpha / LORA.rank * (up @ down)
    torch.testing.assert_close(merged[f"{layer}.weight"].double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(merged["model.embed_tokens.weight"], saved["model.embed_tokens.weight"])

    (tmp_path / "config.json").write_bytes((model_dir / "config.json").read_bytes())
    checksum = write_snapshot(merged, tmp_path / "model.safetensors", torch.float32)
    assert checksum == write_snapshot(policy.full_state_dict(), tmp_path / "again.safetensors", torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        samples = make_samples()
        published, ours = plain_objective(plain, samples), policy_objective(policy, samples)
    torch.testing.assert_close(published, ours, rtol=1e-5, atol=1e-3)


def test_merging_is_exact_in_float32_whatever_the_weights_are_held_in() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 32, generator=generator).bfloat16()
    down, up = torch.randn(4, 32, generator=generator), torch.randn(48, 4, generator=generator)
    kept = weight.clone()
    merged = merge(weight, down, up, 0.5)
    assert merged.dtype == torch.float32
    torch.testing.assert_close(merged.double(), weight.double() + 0.5 * up.double() @ down.double(), rtol=0, atol=2e-6)
    assert torch.equal(weight, kept)
    assert torch.equal(merged, merge(weight, down, up, 0.5))


def test_the_reference_is_the_model_without_adapters_and_no_second_one(
    mesh: DeviceMesh, model_dir: Path, make_samples: SampleMaker
) -> None:
    trainer = Trainer(TRAINED, model_dir, mesh)
    assert trainer.reference is trainer.policy
    batch = micro_batch(make_samples())
    frozen = load_policy(model_dir, mesh, trainable=False)
    assert load_reference(frozen, model_dir, mesh, LoadSettings()) is not frozen
    metrics = [trainer.step(make_samples(seed)) for seed in range(2)]
    assert metrics[0]["kl_ref"] == pytest.approx(0.0, abs=1e-6)
    assert metrics[1]["kl_ref"] > 1e-6
    assert torch.equal(trainer.policy.reference_logprobs(batch, 0.7), frozen.reference_logprobs(batch, 0.7))
    with torch.no_grad():
        assert not torch.equal(trainer.policy.score(batch, 0.7).logprobs, frozen.reference_logprobs(batch, 0.7))


def test_only_adapters_are_trained_and_checkpointed(
    mesh: DeviceMesh, model_dir: Path, tmp_path: Path, make_samples: SampleMaker
) -> None:
    trainer = Trainer(TRAINED, model_dir, mesh)
    before = trainer.full_state_dict()
    trainer.step(make_samples())
    after = trainer.full_state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {name for name in after if "_proj.weight" in name}
    assert all(".lora_" in name for name in trainer.named_tensors())
    assert len(trainer.named_tensors()) == 3 * 2 * len(changed)
    save_checkpoint(trainer, tmp_path, b"blob")

    trainer.step(make_samples(1))
    gone_on = trainer.full_state_dict()
    newest = latest_valid(tmp_path)
    assert newest is not None
    resumed = Trainer(TRAINED, model_dir, mesh)
    assert load_checkpoint(resumed, newest) == b"blob"
    assert all(torch.equal(tensor, after[name]) for name, tensor in resumed.full_state_dict().items())
    resumed.step(make_samples(1))
    assert all(torch.equal(tensor, gone_on[name]) for name, tensor in resumed.full_state_dict().items())


def test_with_bfloat16_frozen_weights_are_held_in_it_and_adapters_are_not(mesh: DeviceMesh, model_dir: Path) -> None:
    policy = load_policy(model_dir, mesh, LoadSettings("bfloat16", lora=LORA))
    kinds = {(".lora_" in name, parameter.dtype) for name, parameter in policy.causal_lm.named_parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    saved = load_file(model_dir / "model.safetensors")
    assert all(torch.equal(tensor, saved[name].bfloat16()) for name, tensor in policy.full_state_dict().items())


def test_targets_can_be_named_and_what_does_not_fit_is_refused(mesh: DeviceMesh, model_dir: Path) -> None:
    lora = LoraSettings(2, 2.0, ("q_proj", "v_proj"))
    names = load_policy(model_dir, mesh, LoadSettings(lora=lora)).named_shards()
    assert {name.split(".")[4] for name in names} == {"q_proj", "v_proj"}
    with pytest.raises(ValueError, match="Target modules"):
        load_policy(model_dir, mesh, LoadSettings(lora=LoraSettings(2, 2.0, ("nowhere",))))
    with pytest.raises(ValueError, match="rank >= 1 and alpha > 0"):
        LoraSettings(0, 1.0)
