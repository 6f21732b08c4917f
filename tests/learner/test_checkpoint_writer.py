"""Checkpoints written in the background: what they hold, what a failure costs, what a kill leaves."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

import learner.checkpoint_writer as module
from learner.checkpoint import CheckpointError, FrozenState, latest_valid, load_checkpoint, write_checkpoint
from learner.checkpoint_writer import CheckpointWriter
from learner.samples import TrainSample
from learner.settings import TrainerSettings
from learner.trainer import Trainer

SampleMaker = Callable[..., list[TrainSample]]
SETTINGS = TrainerSettings(lr=0.01, kl_coef=0.0)


@pytest.fixture
def trainer(mesh: DeviceMesh, model_dir: Path) -> Trainer:
    return Trainer(SETTINGS, model_dir, mesh)


@pytest.fixture
def writer(trainer: Trainer, tmp_path: Path) -> Iterator[CheckpointWriter]:
    writer = CheckpointWriter(trainer, tmp_path, keep=2)
    yield writer
    writer.close()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Holds every write back until it is set."""
    gate = threading.Event()

    def held_back(state: FrozenState, *arguments: object) -> Path:
        assert gate.wait(20)
        return write_checkpoint(state, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "write_checkpoint", held_back)
    return gate


def test_it_holds_the_moment_of_the_call_though_training_went_on(
    trainer: Trainer, writer: CheckpointWriter, gate: threading.Event, make_samples: SampleMaker, tmp_path: Path
) -> None:
    trainer.step(make_samples(seed=0))
    before = {name: tensor.full_tensor().clone() for name, tensor in trainer.named_tensors().items()}
    writer.save(b"one step")
    trainer.step(make_samples(seed=1))
    assert latest_valid(tmp_path) is None, "it is not written yet, and training went on"
    gate.set()
    path = writer.wait()
    assert path == latest_valid(tmp_path) == tmp_path / "step-00000001"
    assert load_checkpoint(trainer, path) == b"one step"
    assert trainer.steps == 1
    restored = trainer.named_tensors()
    assert [name for name in before if not torch.equal(before[name], restored[name].full_tensor())] == []


def test_the_next_one_waits_for_the_one_before(
    trainer: Trainer, writer: CheckpointWriter, make_samples: SampleMaker, tmp_path: Path
) -> None:
    for step in range(3):
        trainer.step(make_samples(seed=step))
        writer.save(f"{step}".encode())
    writer.wait()
    assert writer.wait() is None
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


def test_a_failure_is_told_at_the_next_call(
    trainer: Trainer, writer: CheckpointWriter, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: object) -> Path:
        raise CheckpointError("no space left")

    monkeypatch.setattr(module, "write_checkpoint", full)
    writer.save(b"")
    with pytest.raises(CheckpointError, match="no space left"):
        writer.save(b"")
    monkeypatch.setattr(module, "write_checkpoint", write_checkpoint)
    writer.save(b"there is room again")
    assert writer.wait() == latest_valid(tmp_path)
