"""Two gloo ranks train as one does: adapters, HSDP meshes, offloaded shards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from learner.checkpoint import latest_valid, load_checkpoint
from learner.trainer import Trainer
from tests.learner.sharded_worker import FULL, LORA, train

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def output(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks left."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    worker = ROOT / "tests" / "learner" / "sharded_worker.py"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(worker), str(model_dir), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(actual) == set(expected)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_two_ranks_train_like_one(mesh: DeviceMesh, model_dir: Path, output: Path) -> None:
    full = train(Trainer(FULL, model_dir, mesh))
    for name in ("full_replicated", "full_split", "offloaded"):
        assert_close(load_file(output / f"{name}.safetensors"), full)
    lora = train(Trainer(LORA, model_dir, mesh))
    for name in ("lora", "lora_replicated"):
        assert_close(load_file(output / f"{name}.safetensors"), lora)
    start = load_file(model_dir / "model.safetensors")
    assert max(float((lora[name] - start[name]).abs().max()) for name in start) > 1e-3


@pytest.mark.slow
def test_one_rank_loads_the_adapters_that_two_saved(mesh: DeviceMesh, model_dir: Path, output: Path) -> None:
    newest = latest_valid(output / "checkpoints")
    assert newest is not None
    trainer = Trainer(LORA, model_dir, mesh)
    assert load_checkpoint(trainer, newest) == b"blob"
    published = load_file(output / "lora.safetensors")
    assert all(torch.equal(tensor, published[name]) for name, tensor in trainer.full_state_dict().items())
