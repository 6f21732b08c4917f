"""A checkpoint as a Hugging Face folder: what transformers and vLLM load, on a machine without GPU or process group."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from learner.adapters import LoraSettings, merge
from learner.checkpoint import CheckpointError
from learner.loading import read_causal_lm

SHARD_SIZE = "5GB"
_POLICY = "model."  # of the names in a checkpoint; the rest is the optimizer's


@dataclass(frozen=True)
class ExportedSampling:
    """How the policy was sampled while it was trained; becomes generation_config.json.

    Attributes:
        temperature, top_p: of the training rollouts.
        max_tokens: longest response in tokens.
    """

    temperature: float
    top_p: float
    max_tokens: int


@dataclass(frozen=True)
class TrainedAdapters:
    """What a run with LoRA trained: ``settings``, and the type its frozen weights were held in."""

    settings: LoraSettings
    frozen_dtype: torch.dtype


def export_model(
    checkpoint: Path,
    base: Path,
    target: Path,
    dtype: torch.dtype,
    sampling: ExportedSampling,
    adapters: TrainedAdapters | None = None,
) -> int:
    """Write weights, tokenizer, chat template, config.json and generation_config.json into ``target``.

    Args:
        checkpoint: a valid one, written by any number of ranks.
        base: the folder of the model that was trained: shape and tokenizer are read from it, and with adapters the
            weights to which they are added.
        target: an existing folder. The weights are one safetensors file, or several and an index above 5 GB.
        dtype: of the written weights.
        adapters: of a run with LoRA, whose checkpoints hold nothing else.

    Returns:
        The number of weights written.

    Raises:
        CheckpointError: the checkpoint holds another model than ``base``.
        OSError: ``base`` cannot be read or ``target`` not be written.
    """
    transformers_logging.disable_progress_bar()
    if adapters is None:
        weights = read_policy(checkpoint, dtype)
    else:
        weights = read_merged_policy(checkpoint, base, dtype, adapters)
    model = model_with(weights, base, dtype, checkpoint)
    write_model(model, base, target, sampling)
    return sum(tensor.numel() for tensor in weights.values())


def write_model(model: PreTrainedModel, base: Path, target: Path, sampling: ExportedSampling) -> None:
    """A model into the folder ``target``, with the tokenizer and the chat template of ``base``, from which it came."""
    model.generation_config = generation_config(base, model, sampling)
    model.save_pretrained(target, max_shard_size=SHARD_SIZE)
    AutoTokenizer.from_pretrained(base, local_files_only=True).save_pretrained(target)


def read_policy(checkpoint: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """The policy's weights by Hugging Face name, whole, on the CPU; floating ones as ``dtype``.

    They are rounded while they are read, one slice at a time: a 7B model takes 15 GB as bfloat16, not 30 more.
    """
    reader = HuggingFaceStorageReader(str(checkpoint))
    tensors: dict[str, Tensor] = {}
    for name, stored in reader.read_metadata().state_dict_metadata.items():
        if name.startswith(_POLICY) and isinstance(stored, TensorStorageMetadata):
            floating = stored.properties.dtype.is_floating_point
            tensors[name] = torch.empty(stored.size, dtype=dtype if floating else stored.properties.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is no process group: none is meant
        load(dict(tensors), storage_reader=reader, no_dist=True)
    return {name.removeprefix(_POLICY): tensor for name, tensor in tensors.items()}


def read_merged_policy(
    checkpoint: Path, base: Path, dtype: torch.dtype, adapters: TrainedAdapters
) -> dict[str, Tensor]:
    """The weights of ``base`` with the checkpoint's adapters added, as the learner publishes them."""
    trained = read_policy(checkpoint, torch.float32)
    weights = {name: weight.detach() for name, weight in read_causal_lm(base, adapters.frozen_dtype).named_parameters()}
    scale = adapters.settings.alpha / adapters.settings.rank
    for name, down in trained.items():
        module, is_down, rest = name.partition(".lora_A.")
        if is_down:
            up = trained[f"{module}.lora_B.{rest}"]
            weights[f"{module}.weight"] = merge(weights[f"{module}.weight"], down, up, scale)
    return {name: weight.to(dtype) for name, weight in weights.items()}


def model_with(weights: dict[str, Tensor], base: Path, dtype: torch.dtype, checkpoint: Path) -> PreTrainedModel:
    """The model of ``base``'s shape that holds ``weights``; nothing is initialised or copied.

    Raises:
        CheckpointError: a name or shape differs.
    """
    config = AutoConfig.from_pretrained(base, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    try:
        result = model.load_state_dict(weights, strict=False, assign=True)
    except RuntimeError as error:  # a shape differs
        raise CheckpointError(f"checkpoint {checkpoint} does not fit the model {base}: {error}") from None
    model.tie_weights()  # a tied output layer is not in the checkpoint
    missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if wrong := [*missing, *result.unexpected_keys]:
        raise CheckpointError(
            f"checkpoint {checkpoint} does not fit the model {base}: {wrong[0]} is "
            f"{'missing' if missing else 'not part of it'}; set model.path to the folder that was trained from"
        )
    return model


def generation_config(base: Path, model: PreTrainedModel, sampling: ExportedSampling) -> GenerationConfig:
    """Sampling as in training: the base model's stop tokens, none of its own sampling (top-k, repetition penalty)."""
    if (base / "generation_config.json").is_file():
        tokens = GenerationConfig.from_pretrained(base, local_files_only=True)
    else:
        tokens = GenerationConfig.from_model_config(model.config)
    return GenerationConfig(
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
        do_sample=True,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=0,  # off; left out, transformers would take 50
        max_new_tokens=sampling.max_tokens,
    )
