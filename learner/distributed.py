"""The learner's ranks: process group, device mesh, and messages between ranks as plain bytes (never pickles).

Rank 0 talks to the rest of the system; the other ranks follow it. Control messages go over gloo on the CPU
also where gradients go over NCCL, so that waiting for a batch keeps no GPU kernel spinning. They have the default
group, which may wait for days; the mesh has groups of its own, which may not.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from learner.balance import CostModel, partition
from learner.samples import TrainSample, decode_samples, encode_samples

# A rank may wait this long for the next batch: an outage of a search engine must not kill the learner.
WAIT_FOR_WORK = timedelta(days=7)
COLLECTIVE_TIMEOUT = timedelta(minutes=10)
# A gloo thread lets go of the last collective's tensors a moment after the collective is done, and needs Python's
# lock for that. If it comes for the lock when the interpreter is already ending, the process aborts
# (https://github.com/pytorch/pytorch/pull/179291); the mesh keeps those threads alive beyond the group's end.
# Measured on two ranks of a busy machine: 15 % of all exits without this pause, none with it.
GLOO_GRACE_S = 0.2


def initialize(
    device: str = "auto", replicas: int = 1, collective_timeout: timedelta = COLLECTIVE_TIMEOUT
) -> DeviceMesh:
    """Join (or start) the process group and return the mesh of all ranks.

    With one replica its only dimension shards (FSDP). With several it is (replicate, shard): ranks that follow one
    another share a copy of the model, and gradients are averaged over copies (HSDP).

    Under a launcher the usual variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) are read;
    without them this process is the only rank and no port is opened.

    Args:
        device: "cpu", "cuda" or "auto" (cuda when there is one).
        replicas: copies of the model; they divide the ranks.
        collective_timeout: of training. The mesh's groups give up at twice that: `RankWatch` comes first, and
            says which rank they wait for.

    Raises:
        ValueError: another device name, "cuda" without a GPU, or replicas that do not divide the ranks.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"unknown device {device!r}: choose auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for but torch finds no GPU: use device=cpu or install a CUDA build")
    kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        if "WORLD_SIZE" in os.environ:
            dist.init_process_group(backend, timeout=WAIT_FOR_WORK)
        else:
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=WAIT_FOR_WORK)
    return _mesh(kind, replicas, 2 * collective_timeout)


def _mesh(kind: str, replicas: int, timeout: timedelta) -> DeviceMesh:
    """Built from groups made here, because `init_device_mesh` gives its groups a timeout of its own choice."""
    world_size = dist.get_world_size()
    if world_size % replicas:
        raise ValueError(f"{world_size} ranks cannot be {replicas} equal replicas: learner.replicas must divide them")
    if replicas == 1:
        return DeviceMesh.from_group(dist.new_group(timeout=timeout), kind)
    ranks = torch.arange(world_size).view(replicas, -1)
    across, _ = dist.new_subgroups_by_enumeration(ranks.T.tolist(), timeout=timeout)
    within, _ = dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=timeout)
    return DeviceMesh.from_group([across, within], kind, mesh=ranks, mesh_dim_names=("replicate", "shard"))


@contextmanager
def failures_recorded() -> Iterator[None]:
    """Leave the exception that ends this rank where its launcher reads it, in ``$TORCHELASTIC_ERROR_FILE``.

    At once, before anything is taken down: the other ranks fail as soon as they lose this one, and whose
    failure was the first shall be plain.
    """
    try:
        yield
    except Exception as error:
        get_error_handler().record_exception(error)
        raise


def shutdown() -> None:
    """Leave the process group, if there is one, and let its threads put down what they hold."""
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(GLOO_GRACE_S)


def background_group() -> ProcessGroup:
    """A group of all ranks for a thread of its own, whose collectives then never meet those of training.

    All ranks call this together.
    """
    return dist.new_group(backend="gloo", timeout=WAIT_FOR_WORK)


def broadcast_bytes(payload: bytes | None, group: ProcessGroup | None = None) -> bytes:
    """Rank 0's ``payload`` on every rank; the other ranks pass None. All ranks of ``group`` call this together.

    Raises:
        ValueError: rank 0 passed None.
    """
    leads = dist.get_rank() == 0
    if leads and payload is None:
        raise ValueError("rank 0 must pass the bytes to broadcast")
    if dist.get_world_size() == 1:
        return payload or b""
    size = torch.tensor([len(payload or b"")])
    dist.broadcast(size, src=0, group=group)
    buffer = _as_tensor(payload or b"") if leads else torch.empty(int(size), dtype=torch.uint8)
    if buffer.numel():
        dist.broadcast(buffer, src=0, group=group)
    return payload if leads and payload is not None else buffer.numpy().tobytes()


def gather_bytes(payload: bytes, group: ProcessGroup | None = None) -> list[bytes]:
    """Every rank's ``payload``, in rank order, on every rank. All ranks of ``group`` call this together."""
    if dist.get_world_size() == 1:
        return [payload]
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(payload)]), group=group)
    width = max(int(size) for size in sizes)
    padded = torch.zeros(max(width, 1), dtype=torch.uint8)
    padded[: len(payload)] = _as_tensor(payload)
    buffers = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(buffers, padded, group=group)
    return [buffer[: int(size)].numpy().tobytes() for buffer, size in zip(buffers, sizes, strict=True)]


def _as_tensor(payload: bytes) -> Tensor:
    return torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else torch.empty(0, dtype=torch.uint8)


def all_reduce(values: Sequence[float], maximum: bool = False) -> list[float]:
    """Element-wise sum (or maximum) of float64 values over ranks. All ranks call this together."""
    reduced = torch.tensor(list(values), dtype=torch.float64)
    if dist.get_world_size() > 1:
        dist.all_reduce(reduced, op=dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM)
    return [float(value) for value in reduced]


def scatter_samples(samples: Sequence[TrainSample] | None, cost: CostModel) -> list[TrainSample]:
    """This rank's share, balanced by cost, of the samples that rank 0 holds; the other ranks pass None.

    Raises:
        ValueError: rank 0 passed None.
    """
    world_size = dist.get_world_size()
    if world_size == 1 and samples is not None:
        return list(samples)
    received = decode_samples(broadcast_bytes(None if samples is None else encode_samples(samples)))
    return partition(received, world_size, cost)[dist.get_rank()]
