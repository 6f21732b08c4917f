"""From a Hugging Face folder to a sharded policy that trains."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from learner.policy import Policy
from learner.sharding import COMPUTE_DTYPES, shard


@dataclass(frozen=True)
class LoadSettings:
    """How a model is brought into memory.

    Attributes:
        compute_dtype: "float32" or "bfloat16", of the forward and backward pass.

    Raises:
        ValueError: a value is not one of those.
    """

    compute_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.compute_dtype not in COMPUTE_DTYPES:
            raise ValueError(f"unknown compute dtype {self.compute_dtype!r}: choose one of {', '.join(COMPUTE_DTYPES)}")


DEFAULT = LoadSettings()


def load_policy(
    model_dir: str | Path, mesh: DeviceMesh, settings: LoadSettings = DEFAULT, trainable: bool = True
) -> Policy:
    """Load a causal language model from a local folder and shard it over ``mesh``.

    Weights that are trained stay float32.

    Raises:
        FileNotFoundError: the folder holds no config.json.
    """
    compute_dtype = COMPUTE_DTYPES[settings.compute_dtype]
    causal_lm = read_causal_lm(model_dir, torch.float32)
    device = torch.device(f"cuda:{torch.cuda.current_device()}" if mesh.device_type == "cuda" else "cpu")
    policy = Policy(causal_lm, device)
    policy.requires_grad_(trainable).train(trainable)
    shard(policy, causal_lm.base_model.layers, mesh, compute_dtype)
    policy.note_shards()
    return policy


def read_causal_lm(model_dir: str | Path, dtype: torch.dtype) -> Any:
    """The transformers model in ``model_dir``, on the CPU, its parameters in ``dtype``.

    Raises:
        FileNotFoundError: the folder holds no config.json.
    """
    directory = Path(model_dir)
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"no model in {directory}: config.json is missing; point the model path at a HF folder")
    transformers_logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="sdpa", local_files_only=True, use_safetensors=True
    )
