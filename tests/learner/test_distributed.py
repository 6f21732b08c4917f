"""Two gloo ranks do what one rank does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import DeviceMesh

from learner.balance import CostModel
from learner.checkpoint import latest_valid, load_checkpoint
from learner.distributed import broadcast_bytes, gather_bytes, initialize, scatter_samples
from learner.samples import TrainSample
from learner.settings import TrainerSettings
from learner.trainer import Trainer

ROOT = Path(__file__).parents[2]
# A group cut between ranks computes its prompt on both.
LAYOUT_METRICS = {"seconds", "tokens_per_second", "micro_batches", "input_tokens"}
SampleMaker = Callable[..., list[TrainSample]]


def run_two_ranks(model_dir: Path, output: Path, settings: TrainerSettings) -> None:
    worker = ROOT / "tests" / "learner" / "distributed_worker.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [str(worker), str(model_dir), str(output), json.dumps(asdict(settings))]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr


# A large epsilon keeps Adam from turning rounding differences of tiny gradients into full steps.
GRPO = TrainerSettings(lr=0.1, adam_epsilon=0.1, kl_coef=0.1, micro_batch_tokens=64)
PPO = replace(GRPO, advantage="gae", critic="separate", critic_lr=0.1, kl_in="reward", kl_estimator="k1", minibatches=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        GRPO,
        replace(PPO, critic_epochs=2, critic_lambda=1.0, gae_lambda=0.9),
        replace(PPO, critic="shared", minibatches=1),
        replace(GRPO, minibatches=2, proximal="loglinear"),
    ],
    ids=["grpo", "gae-separate", "gae-shared", "grpo-loglinear"],
)
def test_two_ranks_train_like_one_and_share_checkpoints(
    mesh: DeviceMesh, model_dir: Path, tmp_path: Path, make_samples: SampleMaker, settings: TrainerSettings
) -> None:
    minibatches = settings.minibatches
    run_two_ranks(model_dir, tmp_path, settings)
    alone = Trainer(settings, model_dir, mesh)
    expected = [alone.step(make_samples(seed)) for seed in range(4)]
    expected.append(alone.step(make_samples(4, groups=1, size=minibatches)))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    for ours, theirs in zip(metrics, expected, strict=True):
        for name in set(theirs) - LAYOUT_METRICS:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name
    weights = load_file(tmp_path / "weights.safetensors")
    for name, tensor in alone.full_state_dict().items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-5, rtol=0)

    # What two ranks saved, one rank loads.
    newest = latest_valid(tmp_path / "checkpoints")
    assert newest is not None
    fresh = Trainer(settings, model_dir, mesh)
    assert load_checkpoint(fresh, newest) == b"blob"
    assert fresh.counters()[:2] == (5, 5 * minibatches)
    for name, tensor in fresh.full_state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    restored, trained = fresh.named_tensors(), alone.named_tensors()
    for name in restored:
        torch.testing.assert_close(restored[name].full_tensor(), trained[name].full_tensor(), atol=1e-5, rtol=0)


def test_one_rank_needs_no_messages(mesh: DeviceMesh, make_samples: SampleMaker) -> None:
    samples = make_samples()
    assert mesh.size() == 1
    assert scatter_samples(samples, CostModel()) == samples
    assert broadcast_bytes(b"x") == b"x"
    assert gather_bytes(b"x") == [b"x"]
    with pytest.raises(ValueError, match="rank 0 must pass"):
        broadcast_bytes(None)
    with pytest.raises(ValueError, match="rank 0 must pass"):
        scatter_samples(None, CostModel())


def test_unknown_device_is_named() -> None:
    with pytest.raises(ValueError, match="unknown device 'tpu': choose auto, cpu or cuda"):
        initialize("tpu")
