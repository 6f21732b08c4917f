"""Run under torchrun by test_sharding.py: trains on a mesh of two ranks and writes the published weights.

Arguments: model folder, output folder.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh

from learner.adapters import LoraSettings
from learner.checkpoint import save_checkpoint
from learner.distributed import initialize, shutdown
from learner.settings import TrainerSettings
from learner.trainer import Trainer
from tests.learner.conftest import random_samples

# A large epsilon keeps Adam from turning rounding differences of tiny gradients into full steps.
FULL = TrainerSettings(lr=0.1, adam_epsilon=0.1, kl_coef=0.1, micro_batch_tokens=64, minibatches=2)
LORA = replace(FULL, lora=LoraSettings(rank=4, alpha=8.0), activation_checkpointing=True)
OFFLOADED = replace(FULL, offload="optimizer", activation_checkpointing=True)
STEPS = 3


def train(trainer: Trainer) -> dict[str, torch.Tensor]:
    for seed in range(STEPS):
        trainer.step(random_samples(seed) if trainer.leads else None)
    return trainer.full_state_dict()


def main(model_dir: str, output: Path) -> None:
    torch.set_num_threads(1)
    row = initialize("cpu")
    replicated = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    split = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
    runs = {
        "lora": (LORA, row),
        "lora_replicated": (LORA, replicated),
        "full_replicated": (FULL, replicated),
        "full_split": (FULL, split),
        "offloaded": (OFFLOADED, row),
    }
    for name, (settings, mesh) in runs.items():
        trainer = Trainer(settings, model_dir, mesh)
        weights = train(trainer)
        if trainer.leads:
            save_file(weights, output / f"{name}.safetensors")
        if name == "lora":
            save_checkpoint(trainer, output / "checkpoints", b"blob")
    shutdown()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
