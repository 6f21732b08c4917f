"""Full weights as one safetensors file under Hugging Face names: what actors load and what a run leaves behind."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from common.weights import file_checksum


def write_snapshot(state: Mapping[str, Tensor], path: str | Path, dtype: torch.dtype) -> str:
    """Write ``state`` to ``path`` in one atomic step; equal weights give equal bytes.

    Args:
        state: full CPU tensors by Hugging Face name. Of tensors that share memory (an output layer tied to
            the input embedding) only the first name is written: the loader ties them again.
        path: the file to make or replace; its folder exists.
        dtype: floating dtype of the written weights; tensors of integers keep theirs.

    Returns:
        sha256 of the file's bytes, in hex.

    Raises:
        OSError: the file could not be written; nothing is left behind.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.tmp")
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        tensors[name] = (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
        checksum = file_checksum(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return checksum
