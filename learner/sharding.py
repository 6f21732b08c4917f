"""FSDP2: every decoder layer is one unit, whatever else a model holds belongs to the root."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OFFLOADS = ("none", "optimizer")


def shard(
    module: nn.Module,
    layers: Iterable[nn.Module],
    mesh: DeviceMesh,
    compute_dtype: torch.dtype = torch.float32,
    offload: str = "none",
) -> None:
    """Apply ``fully_shard`` to ``layers`` and to ``module``, in place; parameters become DTensors.

    Weights keep their own dtype, are cast to ``compute_dtype`` for the forward and backward pass, and their
    gradients are reduced in float32.

    Args:
        mesh: one dimension shards over all ranks; two, with names, are (replicate, shard): HSDP, which shards
            inside a row and averages gradients over rows.
        offload: "optimizer" keeps shards, gradients and moments in CPU memory (pinned where the mesh is of
            GPUs) and updates them there; each layer's weights travel to the device when they are needed.
            Gradients then travel at every backward pass, so few large micro-batches are cheaper than many.

    Raises:
        ValueError: the mesh has more than two dimensions, or ``offload`` is unknown.
    """
    if mesh.ndim > 2:
        raise ValueError(f"a mesh of {mesh.ndim} dimensions: pass (shard) or (replicate, shard)")
    if offload not in OFFLOADS:
        raise ValueError(f"unknown offload {offload!r}: choose one of {', '.join(OFFLOADS)}")
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    policy = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload == "optimizer" else OffloadPolicy()
    # Where nothing is split there is nothing to free between forward and backward: resharding would only copy.
    reshard = mesh.size(mesh.ndim - 1) > 1
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision, offload_policy=policy, reshard_after_forward=reshard)
    fully_shard(module, mesh=mesh, mp_policy=precision, offload_policy=policy, reshard_after_forward=False)
