"""The estimate against models that are really there, and the configs that promise to fit."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from common.config import load_config
from common.config.algorithm import AlgorithmConfig
from common.config.schema import Config, LearnerConfig
from learner.adapters import LoraSettings
from learner.loading import LoadSettings, load_policy
from learner.memory import GIB, RUNTIME_BYTES, ModelShape, estimate_memory, read_shape
from learner.settings import TrainerSettings
from learner.trainer import Trainer

CONFIGS = Path(__file__).parents[2] / "configs"
# https://huggingface.co/Qwen/Qwen2.5-3B/blob/main/config.json
QWEN_3B = Qwen2Config(
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=11008,
    num_hidden_layers=36,
    num_attention_heads=16,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)


def learner(**changes: Any) -> Config:
    return Config(learner=LearnerConfig(micro_batch_tokens=100, **changes))


def bytes_of(model: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


@pytest.fixture(scope="module")
def qwen_3b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a 3B model that has headers and no weights."""
    folder = tmp_path_factory.mktemp("qwen")
    QWEN_3B.save_pretrained(folder)
    with torch.device("meta"):
        model = Qwen2ForCausalLM(QWEN_3B)
    names = list(dict(model.named_parameters()))
    parameters = dict(model.named_parameters())
    for number, part in enumerate((names[:100], names[100:])):
        header = {n: {"dtype": "BF16", "shape": list(parameters[n].shape), "data_offsets": [0, 0]} for n in part}
        text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
        (folder / f"model-{number}.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    return folder


def test_what_grows_with_the_parameters_is_what_a_trainer_holds(mesh: DeviceMesh, model_dir: Path) -> None:
    shape = read_shape(model_dir)
    for lora in (None, LoraSettings(4, 8.0), LoraSettings(4, 8.0, ("q_proj", "down_proj"))):
        section = None if lora is None else {"rank": 4, "alpha": 8.0, "targets": lora.targets}
        estimate = estimate_memory(learner(lora=section, dtype="bfloat16"), shape)
        settings = TrainerSettings(lora=lora, compute_dtype="bfloat16", kl_coef=0.001)
        trainer = Trainer(settings, model_dir, mesh)
        moments = [t for name, t in trainer.named_tensors().items() if name.startswith("optimizer.")]
        assert estimate.weights == bytes_of(trainer.policy)
        assert estimate.moments == sum(t.numel() * t.element_size() for t in moments)
        assert estimate.gradients == estimate.moments / 2
        reference = trainer.reference
        second = 0 if reference is trainer.policy or reference is None else bytes_of(reference)
        assert estimate.reference == second


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_what_autograd_keeps(model_dir: Path, checkpointing: bool, dtype: str) -> None:
    tokens = 100
    shape = read_shape(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype)).base_model
    kept: dict[int, Tensor] = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    bytes_kept = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    estimate = estimate_memory(learner(dtype=dtype, activation_checkpointing=checkpointing), shape)
    if checkpointing:  # of both layers one at a time, and the inputs of both
        size = 4 if dtype == "float32" else 2
        assert estimate.activations == pytest.approx(bytes_kept / 2 + 2 * tokens * 64 * size, rel=0.15)
    else:
        assert estimate.activations == pytest.approx(bytes_kept, rel=0.15)


def test_ranks_share_and_offload_moves(model_dir: Path) -> None:
    shape = read_shape(model_dir)
    whole, half = estimate_memory(learner(), shape), estimate_memory(learner(processes=2), shape)
    assert (half.weights, half.moments, half.reference) == (whole.weights / 2, whole.moments / 2, whole.reference / 2)
    assert half.gradients == 1.5 * whole.gradients
    offloaded = estimate_memory(learner(offload="optimizer"), shape)
    at_rest = whole.weights + whole.gradients + whole.moments + whole.reference
    assert offloaded.offloaded == at_rest
    assert offloaded.device == pytest.approx(whole.device - at_rest)
    assert "GiB in CPU memory" in offloaded.describe()
    ppo = learner().model_copy(update={"algorithm": AlgorithmConfig(advantage="gae", critic="separate")})
    critic = estimate_memory(ppo, shape)
    assert critic.weights + critic.moments == 2 * (whole.weights + whole.moments)


def test_pubmed_lora_fits_a_card_of_24_gb(qwen_3b: Path) -> None:
    shape = read_shape(qwen_3b)
    assert shape.parameters == 3_085_938_688
    estimate = estimate_memory(load_config(CONFIGS / "pubmed_lora.yaml"), shape)
    assert 12 * GIB < estimate.device < 24 * GIB
    full = estimate_memory(load_config(CONFIGS / "pubmed.yaml"), shape)
    assert full.device > 48 * GIB


def test_the_adapters_of_pubmed_lora_are_counted_as_peft_makes_them(mesh: DeviceMesh, model_dir: Path) -> None:
    adapters = load_policy(model_dir, mesh, LoadSettings(lora=LoraSettings(8, 8.0))).named_shards()
    assert read_shape(model_dir).adapter_parameters(8, "all-linear") == sum(p.numel() for p in adapters.values())


def test_a_line_names_the_parts() -> None:
    shape = ModelShape({"model.layers.0.mlp.up_proj.weight": (GIB // 4, 1)}, 1, 1, 1, 1)
    estimate = replace(estimate_memory(learner(), shape), activations=0.0)
    assert estimate.runtime == RUNTIME_BYTES
    parts = "weights 1.00, gathered 1.00, gradients 1.00, moments 2.00, reference 1.00, runtime 1.00"
    assert estimate.describe() == f"7.00 GiB per learner rank ({parts})"


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="hold no decoder layer"):
        read_shape(tmp_path)
    text = json.dumps({"model.layers.0.a.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 0]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(ValueError, match="has no num_attention_heads"):
        read_shape(tmp_path)


def test_the_estimate_needs_no_torch() -> None:
    code = "import sys, learner.memory; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
