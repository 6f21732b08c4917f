"""Run under torchrun by test_distributed.py: trains, checkpoints, and writes what the ranks agreed on.

Arguments: model folder, output folder, settings as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from learner.balance import CostModel
from learner.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from learner.distributed import all_reduce, broadcast_bytes, gather_bytes, initialize, scatter_samples, shutdown
from learner.settings import TrainerSettings
from learner.trainer import Trainer
from tests.learner.conftest import random_samples


def check_messages() -> None:
    rank = dist.get_rank()
    for payload in (b"", b"\x00\x01" * 1000):
        assert broadcast_bytes(payload if rank == 0 else None) == payload
        assert gather_bytes(payload * rank) == [payload * each for each in range(dist.get_world_size())]
    assert all_reduce([1.0, float(rank)]) == [2.0, 1.0]
    assert all_reduce([float(-rank)], maximum=True) == [0.0]
    samples = random_samples(groups=5)
    share = scatter_samples(samples if rank == 0 else None, CostModel())
    (total,) = all_reduce([len(share)])
    assert total == len(samples)
    assert 0 < len(share) < len(samples)


def check_failures(trainer: Trainer, output: Path) -> None:
    """A write or read that fails on rank 0 alone is an error on every rank, never a hang."""
    (output / "file").write_text("in the way")
    for call in (
        lambda: save_checkpoint(trainer, output / "file" / "below", b""),
        lambda: load_checkpoint(trainer, output / "nowhere"),
    ):
        try:
            call()
        except CheckpointError:
            continue
        raise AssertionError("expected a CheckpointError")


def main(model_dir: str, output: Path, settings: TrainerSettings) -> None:
    torch.set_num_threads(1)
    mesh = initialize("cpu")
    check_messages()
    trainer = Trainer(settings, model_dir, mesh)
    metrics = [trainer.step(random_samples(seed) if trainer.leads else None) for seed in range(4)]
    # One sample for two ranks: the other one has nothing but placeholders.
    metrics.append(trainer.step(random_samples(4, groups=1, size=settings.minibatches) if trainer.leads else None))
    save_checkpoint(trainer, output / "checkpoints", b"blob")
    check_failures(trainer, output)
    weights = trainer.full_state_dict()
    if trainer.leads:
        save_file(weights, output / "weights.safetensors")
        (output / "metrics.json").write_text(json.dumps(metrics))
    else:
        assert weights == {}
    shutdown()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), TrainerSettings(**json.loads(sys.argv[3])))
