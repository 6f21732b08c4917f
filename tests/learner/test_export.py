"""An exported policy is the trained one, whatever number of ranks saved it and whoever loads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.engine import EngineOptions, GenerationRequest, vllm_problem
from learner import export
from learner.adapters import LoraSettings
from learner.batch import TrainSample
from learner.checkpoint import CheckpointError, find_checkpoint, latest_valid, load_checkpoint, save_checkpoint
from learner.export import ExportedSampling, TrainedAdapters, export_model, read_policy
from learner.settings import TrainerSettings
from learner.trainer import Trainer
from tests.learner.test_distributed import run_two_ranks
from tests.tiny_model import build_tiny_model

SampleMaker = Callable[..., list[TrainSample]]
SAMPLING = ExportedSampling(temperature=0.7, top_p=0.9, max_tokens=24)
PROMPT = [5, 99, 301, 17, 256]


@pytest.fixture
def trainer(mesh: DeviceMesh, model_dir: Path, make_samples: SampleMaker) -> Trainer:
    trainer = Trainer(TrainerSettings(lr=0.05, kl_coef=0.0), model_dir, mesh)
    trainer.step(make_samples())
    return trainer


def exported(checkpoint: Path, base: Path, target: Path, dtype: torch.dtype = torch.float32) -> Path:
    target.mkdir()
    export_model(checkpoint, base, target, dtype, SAMPLING)
    return target


def greedy(model: torch.nn.Module, tokens: int = 24) -> list[int]:
    prompt = torch.tensor([PROMPT])
    return model.generate(prompt, do_sample=False, max_new_tokens=tokens)[0, len(PROMPT) :].tolist()


def policy_of(trainer: Trainer, model_dir: Path) -> torch.nn.Module:
    """The policy as it stands in the trainer, in a plain model."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model.load_state_dict(trainer.full_state_dict(), strict=False)
    return model


def test_transformers_generates_what_the_policy_does(trainer: Trainer, model_dir: Path, tmp_path: Path) -> None:
    target = exported(save_checkpoint(trainer, tmp_path / "checkpoints", b""), model_dir, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(target, dtype="auto")
    tokens = greedy(policy_of(trainer, model_dir))
    assert greedy(loaded) == tokens
    assert tokens != greedy(AutoModelForCausalLM.from_pretrained(model_dir)), "training has changed the policy"
    for name, tensor in trainer.full_state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_tokenizer_template_and_sampling_come_along(trainer: Trainer, model_dir: Path, tmp_path: Path) -> None:
    base = build_tiny_model(tmp_path / "base")
    (base / "generation_config.json").write_text('{"eos_token_id": [1, 2], "top_k": 20, "repetition_penalty": 1.05}')
    target = exported(save_checkpoint(trainer, tmp_path / "checkpoints", b""), base, tmp_path / "out", torch.bfloat16)
    chat = [{"role": "user", "content": "aspirin <answer> stroke"}]
    theirs, ours = (AutoTokenizer.from_pretrained(folder) for folder in (base, target))
    assert ours.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) == theirs.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=False
    )
    sampling = json.loads((target / "generation_config.json").read_text())
    expected = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0, "max_new_tokens": 24}
    assert sampling | expected == sampling
    assert sampling["eos_token_id"] == [1, 2]
    assert "repetition_penalty" not in sampling, "rollouts have none"
    assert {tensor.dtype for tensor in load_file(target / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("tied", [True, False])
def test_an_output_layer_is_tied_or_its_own(mesh: DeviceMesh, tmp_path: Path, tied: bool) -> None:
    base = build_tiny_model(tmp_path / "base", tied=tied)
    trainer = Trainer(TrainerSettings(kl_coef=0.0), base, mesh)
    target = exported(save_checkpoint(trainer, tmp_path / "checkpoints", b""), base, tmp_path / "out")
    assert ("lm_head.weight" in load_file(target / "model.safetensors")) is not tied
    assert greedy(AutoModelForCausalLM.from_pretrained(target)) == greedy(AutoModelForCausalLM.from_pretrained(base))


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_the_critic_stays_behind(
    mesh: DeviceMesh, model_dir: Path, make_samples: SampleMaker, tmp_path: Path, critic: str
) -> None:
    trainer = Trainer(TrainerSettings(lr=0.05, kl_coef=0.0, advantage="gae", critic=critic), model_dir, mesh)
    trainer.step(make_samples())
    target = exported(save_checkpoint(trainer, tmp_path / "checkpoints", b""), model_dir, tmp_path / "out")
    written, policy = load_file(target / "model.safetensors"), trainer.full_state_dict()
    assert set(written) == set(policy)
    assert [name for name in written if not torch.equal(written[name], policy[name])] == []


@pytest.mark.parametrize("frozen", ["float32", "bfloat16"])
def test_adapters_are_added_as_the_learner_publishes_them(
    mesh: DeviceMesh, model_dir: Path, make_samples: SampleMaker, tmp_path: Path, frozen: str
) -> None:
    lora = LoraSettings(rank=4, alpha=8.0)
    trainer = Trainer(TrainerSettings(lr=0.05, kl_coef=0.0, lora=lora, compute_dtype=frozen), model_dir, mesh)
    for seed in range(2):
        trainer.step(make_samples(seed))
    checkpoint = save_checkpoint(trainer, tmp_path / "checkpoints", b"")
    (target := tmp_path / "out").mkdir()
    adapters = TrainedAdapters(lora, getattr(torch, frozen))
    export_model(checkpoint, model_dir, target, torch.float32, SAMPLING, adapters)
    written, published = load_file(target / "model.safetensors"), trainer.full_state_dict()
    assert set(written) == set(published)
    assert [name for name in written if not torch.equal(written[name], published[name])] == []
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(written[name], load_file(model_dir / "model.safetensors")[name])


def test_a_large_model_is_cut_into_files_with_an_index(
    trainer: Trainer, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "SHARD_SIZE", "200KB")
    target = exported(save_checkpoint(trainer, tmp_path / "checkpoints", b""), model_dir, tmp_path / "out")
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert set(index["weight_map"]) == set(trainer.full_state_dict())
    assert greedy(AutoModelForCausalLM.from_pretrained(target)) == greedy(policy_of(trainer, model_dir))


def test_rounding_while_reading_is_rounding_afterwards(trainer: Trainer, tmp_path: Path) -> None:
    checkpoint = save_checkpoint(trainer, tmp_path, b"")
    exact, rounded = read_policy(checkpoint, torch.float32), read_policy(checkpoint, torch.bfloat16)
    for name, tensor in exact.items():
        assert torch.equal(rounded[name], tensor.to(torch.bfloat16)), name


def test_a_checkpoint_of_another_model_is_refused(trainer: Trainer, tmp_path: Path) -> None:
    checkpoint = save_checkpoint(trainer, tmp_path / "checkpoints", b"")
    with pytest.raises(CheckpointError, match="does not fit the model"):
        exported(checkpoint, build_tiny_model(tmp_path / "wider", vocab=600), tmp_path / "first")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing.*set model\.path"):
        exported(checkpoint, build_tiny_model(tmp_path / "untied", tied=False), tmp_path / "second")


def test_the_step_asked_for_or_those_there_are(trainer: Trainer, tmp_path: Path) -> None:
    for steps in (10, 20, 30):
        trainer.steps = steps
        save_checkpoint(trainer, tmp_path, b"", keep=5)
    again = save_checkpoint(trainer, tmp_path, b"", keep=5)
    assert find_checkpoint(tmp_path) == find_checkpoint(tmp_path, 30) == again
    assert find_checkpoint(tmp_path, 10) == tmp_path / "step-00000010"
    (tmp_path / "step-00000020" / "blob.bin").unlink()
    with pytest.raises(CheckpointError, match=r"of step 20 \(its checkpoint is damaged\).*available: 10, 30"):
        find_checkpoint(tmp_path, 20)
    with pytest.raises(CheckpointError, match=r"of step 15 \(it has none\).*available: 10, 30"):
        find_checkpoint(tmp_path, 15)
    with pytest.raises(CheckpointError, match="holds no valid checkpoint"):
        find_checkpoint(tmp_path / "nowhere")


@pytest.mark.slow
def test_two_ranks_export_what_one_rank_does(mesh: DeviceMesh, model_dir: Path, tmp_path: Path) -> None:
    settings = TrainerSettings(lr=0.1, kl_coef=0.1, micro_batch_tokens=64)
    run_two_ranks(model_dir, tmp_path, settings)
    by_two = latest_valid(tmp_path / "checkpoints")
    assert by_two is not None
    assert len(list(by_two.glob("*.safetensors"))) == 2
    alone = Trainer(settings, model_dir, mesh)
    load_checkpoint(alone, by_two)
    by_one = save_checkpoint(alone, tmp_path / "alone", b"")
    first = load_file(exported(by_two, model_dir, tmp_path / "first") / "model.safetensors")
    second = load_file(exported(by_one, model_dir, tmp_path / "second") / "model.safetensors")
    gathered = load_file(tmp_path / "weights.safetensors")
    assert set(first) == set(second) == set(gathered)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        assert torch.equal(tensor, gathered[name]), name


@pytest.mark.slow
@pytest.mark.skipif(vllm_problem() is not None, reason=str(vllm_problem()))
async def test_vllm_loads_it_and_generates_the_same(trainer: Trainer, model_dir: Path, tmp_path: Path) -> None:
    from actors.vllm_engine import VllmEngine

    target = exported(save_checkpoint(trainer, tmp_path / "checkpoints", b""), model_dir, tmp_path / "out")
    engine = VllmEngine(EngineOptions(max_model_len=128, max_sequences=2))
    await engine.start(target, version=0)
    try:
        (completion,) = await engine.generate(GenerationRequest("r", PROMPT, 1, 0.0, 1.0, 24, "never", 0))
    finally:
        await engine.close()
    np.testing.assert_array_equal(completion.token_ids, greedy(AutoModelForCausalLM.from_pretrained(target)))
