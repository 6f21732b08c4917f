"""From a Hugging Face folder to a sharded policy that trains."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from learner.adapters import LoraSettings, add_adapters
from learner.attention import PACKED, check_attention
from learner.policy import Policy
from learner.sharding import COMPUTE_DTYPES, OFFLOADS, shard
from learner.value_head import ValueHead, shard_value_head


@dataclass(frozen=True)
class LoadSettings:
    """How a model is brought into memory.

    Attributes:
        compute_dtype: "float32" or "bfloat16", of the forward and backward pass. Weights that are trained are
            float32 either way; frozen ones are held in this type.
        lora: train adapters only; None trains all weights.
        activation_checkpointing: keep only the input of each decoder layer for the backward pass and compute the
            rest again.
        compile: ``torch.compile`` for each decoder layer.
        offload: see ``learner.sharding.shard``.
        seed: of the adapters.

    Raises:
        ValueError: a value is not one of those.
    """

    compute_dtype: str = "float32"
    lora: LoraSettings | None = None
    activation_checkpointing: bool = False
    compile: bool = False
    offload: str = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in (("compute_dtype", tuple(COMPUTE_DTYPES)), ("offload", OFFLOADS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: choose one of {', '.join(choices)}")


DEFAULT = LoadSettings()


def load_policy(
    model_dir: str | Path,
    mesh: DeviceMesh,
    settings: LoadSettings = DEFAULT,
    trainable: bool = True,
    value_head: bool = False,
) -> Policy:
    """Load a causal language model from a local folder and shard it over ``mesh``.

    Args:
        trainable: False freezes every weight and adds no adapters.
        value_head: add one, for a critic that shares this model.

    Raises:
        FileNotFoundError: the folder holds no config.json.
        ValueError: the model has no module of a name in ``settings.lora.targets``, or ``check_linear_output``
            refuses it.
    """
    compute_dtype = COMPUTE_DTYPES[settings.compute_dtype]
    lora = settings.lora if trainable else None
    causal_lm = read_causal_lm(model_dir, torch.float32 if trainable and lora is None else compute_dtype)
    causal_lm.requires_grad_(trainable).train(trainable)
    if lora is not None:
        add_adapters(causal_lm, lora, settings.seed)
    layers = causal_lm.base_model.layers
    prepare_layers(layers, settings)
    device = torch.device(f"cuda:{torch.cuda.current_device()}" if mesh.device_type == "cuda" else "cpu")
    policy = Policy(causal_lm, device, ValueHead(int(causal_lm.config.hidden_size)) if value_head else None)
    if policy.value_head is not None:
        shard_value_head(policy.value_head, mesh, settings.offload)
    shard(policy, layers, mesh, compute_dtype, settings.offload)
    policy.note_shards()
    return policy


def load_reference(policy: Policy, model_dir: str | Path, mesh: DeviceMesh, settings: LoadSettings) -> Policy:
    """The policy to ask for ``reference_logprobs``, of the model in ``model_dir`` from which ``policy`` was loaded.

    With adapters it is ``policy`` itself, which holds the frozen weights already; else a second, frozen model.

    Raises:
        FileNotFoundError: the folder holds no config.json.
    """
    return policy if settings.lora is not None else load_policy(model_dir, mesh, settings, trainable=False)


def read_causal_lm(model_dir: str | Path, dtype: torch.dtype) -> Any:
    """The transformers model in ``model_dir``, on the CPU, its parameters in ``dtype``.

    Raises:
        FileNotFoundError: the folder holds no config.json.
    """
    directory = Path(model_dir)
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"no model in {directory}: config.json is missing; point the model path at a HF folder")
    transformers_logging.disable_progress_bar()
    causal_lm = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation=PACKED, local_files_only=True, use_safetensors=True
    )
    check_attention(causal_lm)
    return causal_lm


def prepare_layers(layers: Iterable[nn.Module], settings: LoadSettings) -> None:
    """Compile and checkpoint decoder layers, in place; before they are sharded.

    The layer's ``forward`` is replaced rather than the layer wrapped, so that parameters keep their names, and FSDP's
    hooks, which gather the weights, stay outside of both. All layers share one compiled code, as they share theirs.
    """
    for layer in layers:
        forward = layer.forward
        if settings.compile:
            forward = torch.compile(forward)
        if settings.activation_checkpointing:
            forward = functools.partial(checkpoint, forward, use_reentrant=False)
        layer.forward = forward
