"""Checkpoints: bit-identical continuation, damage, a full disk."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from learner.checkpoint import CheckpointError, latest_valid, load_checkpoint, save_checkpoint
from learner.samples import TrainSample
from learner.settings import TrainerSettings
from learner.trainer import Trainer
from tests.tiny_model import build_tiny_model

SampleMaker = Callable[..., list[TrainSample]]
SETTINGS = TrainerSettings(lr=0.01, minibatches=2, kl_coef=0.1, warmup_steps=3)
PPO = replace(SETTINGS, advantage="gae", critic="separate", critic_lr=0.01, critic_warmup_steps=1, kl_in="reward")


@pytest.fixture
def trainer(mesh: DeviceMesh, model_dir: Path) -> Trainer:
    return Trainer(SETTINGS, model_dir, mesh)


def everything(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.full_tensor().clone() for name, tensor in trainer.named_tensors().items()}


def assert_identical(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert set(first) == set(second)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def shard_of(folder: Path) -> Path:
    (shard,) = folder.glob("*.safetensors")
    return shard


@pytest.mark.parametrize(
    "settings", [SETTINGS, replace(PPO, critic_epochs=3), replace(PPO, critic="shared")], ids=lambda s: s.critic
)
def test_a_resumed_run_is_bit_identical(
    mesh: DeviceMesh, model_dir: Path, make_samples: SampleMaker, tmp_path: Path, settings: TrainerSettings
) -> None:
    trainer = Trainer(settings, model_dir, mesh)
    for step in range(2):
        trainer.step(make_samples(seed=step))
    path = save_checkpoint(trainer, tmp_path, b"the ledger \x00\xff")
    drawn = torch.rand(4)
    expected_metrics = [trainer.step(make_samples(seed=step)) for step in (2, 3)]
    resumed = Trainer(settings, model_dir, mesh)
    resumed.step(make_samples(seed=9))  # leaves weights, moments and counters that all have to go
    assert load_checkpoint(resumed, path) == b"the ledger \x00\xff"
    assert torch.equal(torch.rand(4), drawn)
    metrics = [resumed.step(make_samples(seed=step)) for step in (2, 3)]
    critic_updates = 0 if settings.critic == "none" else 8 * settings.critic_epochs
    assert resumed.counters() == trainer.counters() == (4, 8 - 2 * settings.critic_warmup_steps, critic_updates)
    for ours, theirs in zip(metrics, expected_metrics, strict=True):
        assert ours | {"seconds": 0, "tokens_per_second": 0} == theirs | {"seconds": 0, "tokens_per_second": 0}
    assert_identical(everything(resumed), everything(trainer))


def damage_nothing_else(folder: Path, kind: str) -> None:
    shard = shard_of(folder)
    if kind == "truncated":
        os.truncate(shard, shard.stat().st_size // 2)
    elif kind == "flipped bit":
        content = bytearray(shard.read_bytes())
        content[-7] ^= 1
        shard.write_bytes(content)
    elif kind == "missing file":
        (folder / "blob.bin").unlink()
    elif kind == "missing manifest":
        (folder / "manifest.json").unlink()
    else:
        (folder / "manifest.json").write_text("{")


@pytest.mark.parametrize("kind", ["truncated", "flipped bit", "missing file", "missing manifest", "broken manifest"])
def test_a_damaged_checkpoint_is_skipped_with_a_warning(
    trainer: Trainer, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    older = save_checkpoint(trainer, tmp_path, b"old")
    trainer.steps += 1
    newer = save_checkpoint(trainer, tmp_path, b"new")
    assert latest_valid(tmp_path) == newer
    damage_nothing_else(newer, kind)
    with caplog.at_level(logging.WARNING):
        assert latest_valid(tmp_path) == older
    assert str(newer) in caplog.text
    with pytest.raises(CheckpointError, match=r"damaged|incomplete"):
        load_checkpoint(trainer, newer)
    assert load_checkpoint(trainer, older) == b"old"


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert latest_valid(tmp_path) is None
    assert latest_valid(tmp_path / "nowhere") is None


def test_the_last_ones_are_kept_and_interrupted_writes_are_ignored(trainer: Trainer, tmp_path: Path) -> None:
    (tmp_path / ".writing-step-00000099").mkdir()
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    for step in (8, 9, 10):
        trainer.steps = step
        save_checkpoint(trainer, tmp_path, b"", keep=2)
    names = {path.name for path in tmp_path.iterdir() if path.name.startswith("step-")}
    assert names == {"step-00000009", "step-00000010"}
    assert latest_valid(tmp_path) == tmp_path / "step-00000010"


def test_a_second_checkpoint_of_one_step_replaces_nothing(trainer: Trainer, tmp_path: Path) -> None:
    first = save_checkpoint(trainer, tmp_path, b"regular")
    second = save_checkpoint(trainer, tmp_path, b"on Ctrl-C")
    assert first != second
    assert load_checkpoint(trainer, first) == b"regular"
    newest = latest_valid(tmp_path)
    assert newest == second
    assert load_checkpoint(trainer, second) == b"on Ctrl-C"
    third = save_checkpoint(trainer, tmp_path, b"again", keep=1)
    assert [path.name for path in tmp_path.iterdir()] == [third.name]
    assert save_checkpoint(trainer, tmp_path, b"and again", keep=2) not in (second, third)


def test_a_full_disk_is_one_clear_error_and_costs_nothing(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = save_checkpoint(trainer, tmp_path, b"kept")
    trainer.steps += 1

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for failing_call in (1, 3, 4):  # our own files, the shard, the manifest
        calls = []

        def count_then_fail(descriptor: int, limit: int = failing_call, calls: list[int] = calls) -> None:
            calls.append(descriptor)
            if len(calls) >= limit:
                full(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", count_then_fail)
            with pytest.raises(CheckpointError, match="no space left for a checkpoint") as caught:
                save_checkpoint(trainer, tmp_path, b"lost")
        assert "\n" not in str(caught.value)
        assert len(calls) == failing_call
        assert [path.name for path in tmp_path.iterdir()] == [kept.name]
    assert latest_valid(tmp_path) == kept


def test_a_checkpoint_of_another_model_is_refused(trainer: Trainer, mesh: DeviceMesh, tmp_path: Path) -> None:
    path = save_checkpoint(trainer, tmp_path / "checkpoints", b"")
    other = Trainer(SETTINGS, build_tiny_model(tmp_path / "other", vocab=600), mesh)
    with pytest.raises(CheckpointError, match="does not fit this model"):
        load_checkpoint(other, path)


def test_a_critic_cannot_be_resumed_from_a_run_without_one(
    trainer: Trainer, mesh: DeviceMesh, model_dir: Path, tmp_path: Path
) -> None:
    path = save_checkpoint(trainer, tmp_path, b"")
    with pytest.raises(CheckpointError, match="does not fit this model"):
        load_checkpoint(Trainer(PPO, model_dir, mesh), path)


def test_a_checkpoint_holds_no_pickle(trainer: Trainer, tmp_path: Path) -> None:
    path = save_checkpoint(trainer, tmp_path, b"blob")
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".msgpack", ".bin", ".json"}
    for file in path.iterdir():
        # Protocol 2 and later start with \x80 and the protocol; torch.save's zip with PK.
        assert file.read_bytes()[:2] not in (b"\x80\x02", b"\x80\x04", b"\x80\x05", b"PK")
