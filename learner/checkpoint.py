"""Checkpoints of the learner that survive being cut off at any moment.

A checkpoint is a folder ``step-00000042`` with the sharded weights and Adam moments as safetensors (one file
per rank, written by torch.distributed.checkpoint, readable by any number of ranks), the counters and random
states as MessagePack, the caller's own bytes, and a manifest with the size and SHA-256 of every file. It is
written under a temporary name and renamed when complete and synced. No file is a pickle, so a checkpoint can
be loaded without trust.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from common.weights import file_checksum
from learner.distributed import broadcast_bytes, gather_bytes
from learner.trainer import Trainer

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
COUNTERS = "trainer.msgpack"
BLOB = "blob.bin"
FORMAT = 1
# A second checkpoint of one step (say, on Ctrl-C just after the regular one) is step-N.1: nothing is ever
# overwritten.
_FOLDER = re.compile(r"step-(\d{8,})(?:\.(\d+))?")
_Result = TypeVar("_Result")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says what to do."""


class _FileEntry(msgspec.Struct, forbid_unknown_fields=True):
    size: int
    sha256: str


class _Manifest(msgspec.Struct, forbid_unknown_fields=True):
    format: int
    step: int
    files: dict[str, _FileEntry]


class _TrainerState(msgspec.Struct, forbid_unknown_fields=True):
    steps: int
    updates: int
    critic_updates: int
    cpu_rng: list[bytes]  # one per rank
    device_rng: list[bytes]  # one per rank, empty without a GPU


@dataclass(frozen=True)
class FrozenState:
    """What a checkpoint will hold, copied at one moment; training may go on while it is written."""

    tensors: dict[str, Tensor]
    counters: _TrainerState
    blob: bytes
    leads: bool


def freeze(trainer: Trainer, blob: bytes) -> FrozenState:
    """Copy the trainer's state to CPU memory. All ranks call this together; only rank 0's blob is kept."""
    tensors = BlockingAsyncStager().stage(trainer.named_tensors())
    counters = _TrainerState(*trainer.counters(), *_random_states(trainer.policy.device))
    return FrozenState(tensors, counters, blob, trainer.leads)


def save_checkpoint(trainer: Trainer, directory: str | Path, blob: bytes, keep: int = 2) -> Path:
    """Freeze and write at once; see ``write_checkpoint``. `CheckpointWriter` does the same in the background."""
    return write_checkpoint(freeze(trainer, blob), directory, keep)


def write_checkpoint(
    state: FrozenState, directory: str | Path, keep: int = 2, group: ProcessGroup | None = None
) -> Path:
    """Write ``state`` to ``directory``/step-N, N = the trainer's steps; keep the last ``keep`` checkpoints.

    All ranks of ``group`` call this together. The folder must be visible to all ranks.

    Raises:
        CheckpointError: on every rank, if any could not write (the disk is full, no permission). Earlier
            checkpoints are untouched and nothing is left of this one.
    """
    folder = Path(directory)
    steps = state.counters.steps
    temporary = folder / f".writing-step-{steps:08d}"
    final = _new_name(folder, steps)
    try:
        _together(lambda: _write_own_files(temporary, state) if state.leads else None, group)
        writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        save(state.tensors, storage_writer=writer, process_group=group)
        files = _gather_entries(_together(lambda: _hash_share(temporary), group), group)
        manifest = _Manifest(format=FORMAT, step=steps, files=files)
        _together(lambda: _publish(temporary, final, manifest) if state.leads else None, group)
    except (OSError, CheckpointException, CheckpointError) as error:
        if state.leads:
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(_explain(error, folder)) from None
    if state.leads:
        _prune(folder, keep)
    return final


def load_checkpoint(trainer: Trainer, path: str | Path) -> bytes:
    """Restore weights, optimizer, counters and random states in place; returns the caller's bytes on every rank.

    All ranks call this together. The number of ranks may differ from the one that saved; ranks that had no
    predecessor keep their random state.

    Raises:
        CheckpointError: the checkpoint is incomplete, damaged, or of another model.
    """
    folder = Path(path)
    _together(lambda: _require_valid(folder) if trainer.leads else None)
    own = trainer.named_tensors()
    try:
        load(own, storage_reader=HuggingFaceStorageReader(str(folder)))
    except (CheckpointException, KeyError, ValueError, AssertionError) as error:
        raise CheckpointError(f"checkpoint {folder} does not fit this model: {_first_cause(error)}") from None
    state = msgspec.msgpack.decode(
        broadcast_bytes((folder / COUNTERS).read_bytes() if trainer.leads else None), type=_TrainerState
    )
    trainer.restore_counters(state.steps, state.updates, state.critic_updates)
    _restore_random_states(state, trainer.policy.device)
    return broadcast_bytes((folder / BLOB).read_bytes() if trainer.leads else None)


def latest_valid(directory: str | Path) -> Path | None:
    """The newest complete and undamaged checkpoint, or None; damaged ones are named in a warning and skipped."""
    for folder in reversed(_checkpoints(Path(directory))):
        if (problem := _problem(folder)) is None:
            return folder
        logger.warning("%s; trying the one before it", problem)
    return None


def find_checkpoint(directory: str | Path, step: int | None = None) -> Path:
    """The newest valid checkpoint of ``step``, or of all steps where it is None (see ``latest_valid``).

    Raises:
        CheckpointError: there is none; the message says why, and which steps there are.
    """
    folder = Path(directory)
    wanted = [entry for entry in _checkpoints(folder) if step in (None, step_of(entry))]
    for candidate in reversed(wanted):
        if (problem := _problem(candidate)) is None:
            return candidate
        logger.warning("%s", problem)
    steps = sorted({step_of(entry) for entry in _checkpoints(folder) if _problem(entry) is None})
    known = f"available: {', '.join(map(str, steps))}" if steps else "it holds no valid checkpoint"
    reason = "its checkpoint is damaged" if wanted else "it has none"
    of = "" if step is None else f" of step {step} ({reason})"
    raise CheckpointError(f"no valid checkpoint{of} in {folder}; {known}")


def step_of(checkpoint: Path) -> int:
    """Training steps done in a checkpoint, from the name of its folder."""
    match = _FOLDER.fullmatch(checkpoint.name)
    if match is None:
        raise CheckpointError(f"{checkpoint} is no checkpoint: its name is not step-N")
    return int(match[1])


def _checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoint folders, oldest first."""
    if not directory.is_dir():
        return []
    found = [(match, entry) for entry in directory.iterdir() if (match := _FOLDER.fullmatch(entry.name))]
    return [entry for match, entry in sorted(found, key=lambda pair: (int(pair[0][1]), int(pair[0][2] or 0)))]


def _new_name(directory: Path, step: int) -> Path:
    name = f"step-{step:08d}"
    same_step = [entry.name for entry in _checkpoints(directory) if entry.name.split(".")[0] == name]
    if not same_step:
        return directory / name
    _, _, attempt = same_step[-1].partition(".")
    return directory / f"{name}.{int(attempt or 0) + 1}"


def _require_valid(folder: Path) -> None:
    """Raise CheckpointError unless every file of the manifest is there with its size and checksum."""
    try:
        manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=_Manifest)
        for name, entry in manifest.files.items():
            if (folder / name).stat().st_size != entry.size or file_checksum(folder / name) != entry.sha256:
                raise CheckpointError(f"checkpoint {folder} is damaged: {name} is not what was written")
    except (OSError, msgspec.MsgspecError) as error:
        raise CheckpointError(f"checkpoint {folder} is incomplete: {error}") from None


def _problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None for a valid one."""
    try:
        _require_valid(folder)
    except CheckpointError as error:
        return str(error)
    return None


def _write_own_files(temporary: Path, state: FrozenState) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    _write_synced(temporary / COUNTERS, msgspec.msgpack.encode(state.counters))
    _write_synced(temporary / BLOB, state.blob)


def _write_synced(path: Path, payload: bytes) -> None:
    with open(path, "wb") as stream:
        stream.write(payload)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hash_share(folder: Path) -> dict[str, _FileEntry]:
    """Every rank hashes its part of the files, as hashing one large model's state takes a minute."""
    names = sorted(entry.name for entry in folder.iterdir())
    mine = names[dist.get_rank() :: dist.get_world_size()]
    return {name: _FileEntry((folder / name).stat().st_size, file_checksum(folder / name)) for name in mine}


def _gather_entries(own: dict[str, _FileEntry], group: ProcessGroup | None) -> dict[str, _FileEntry]:
    entries: dict[str, _FileEntry] = {}
    for payload in gather_bytes(msgspec.json.encode(own), group):
        entries |= msgspec.json.decode(payload, type=dict[str, _FileEntry])
    return entries


def _publish(temporary: Path, final: Path, manifest: _Manifest) -> None:
    """The last act of a save: after the rename the checkpoint exists, before it there is none."""
    _write_synced(temporary / MANIFEST, msgspec.json.format(msgspec.json.encode(manifest)))
    _sync_folder(temporary)
    os.rename(temporary, final)
    _sync_folder(final.parent)


def _prune(folder: Path, keep: int) -> None:
    for old in _checkpoints(folder)[: -max(keep, 1)]:
        shutil.rmtree(old, ignore_errors=True)


def _together(action: Callable[[], _Result], group: ProcessGroup | None = None) -> _Result:
    """Run ``action`` on every rank; if it fails on one, all raise, so that none waits for the others for ever."""
    failure: OSError | CheckpointError | None = None
    result: _Result | None = None
    try:
        result = action()
    except (OSError, CheckpointError) as error:
        failure = error
    reports = gather_bytes(str(failure).encode() if failure else b"", group)
    if failure is not None:
        raise failure
    for rank, report in enumerate(reports):
        if report:
            raise CheckpointError(f"rank {rank}: {report.decode()}")
    return cast(_Result, result)


def _first_cause(error: BaseException) -> BaseException:
    """The exception of the first failed rank inside torch's wrapper, which itself prints many lines."""
    if isinstance(error, CheckpointException) and error.failures:
        return _first_cause(next(iter(error.failures.values()))[0])
    return error


def _explain(error: BaseException, folder: Path) -> str:
    cause = _first_cause(error)
    if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(folder if folder.is_dir() else folder.parent).free / 2**20
        return f"no space left for a checkpoint in {folder} ({free:.0f} MiB free): free some, then --resume"
    reason = str(cause).splitlines()[0] if str(cause) else repr(cause)
    return f"could not write a checkpoint to {folder}: {reason}"


def _random_states(device: torch.device) -> tuple[list[bytes], list[bytes]]:
    on_device = torch.cuda.get_rng_state(device).numpy().tobytes() if device.type == "cuda" else b""
    return gather_bytes(torch.get_rng_state().numpy().tobytes()), gather_bytes(on_device)


def _restore_random_states(state: _TrainerState, device: torch.device) -> None:
    rank = dist.get_rank()
    if rank >= len(state.cpu_rng):
        return
    torch.set_rng_state(torch.frombuffer(bytearray(state.cpu_rng[rank]), dtype=torch.uint8))
    if device.type == "cuda" and state.device_rng[rank]:
        torch.cuda.set_rng_state(torch.frombuffer(bytearray(state.device_rng[rank]), dtype=torch.uint8), device)
