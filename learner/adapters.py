"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685, section 4.1): y = W x + (alpha / rank) B A x, W frozen.

peft puts them into the model; here is what a policy that trains them needs besides: the weights with the adapters
added, under the names the model had without them, and the model with the adapters off.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ALL_LINEAR = "all-linear"
_NAME = "default"  # peft's own name for the only adapter


@dataclass(frozen=True)
class LoraSettings:
    """Shape of the adapters.

    There is no dropout: the policy that is trained would not be the one that is published, and importance ratios
    would be those of its noise.

    Attributes:
        rank: columns of B and rows of A, at least 1.
        alpha: B A is scaled by ``alpha / rank``.
        targets: endings of module names, or "all-linear": every linear layer but the output layer.

    Raises:
        ValueError: rank or alpha is not positive.
    """

    rank: int
    alpha: float
    targets: str | tuple[str, ...] = ALL_LINEAR

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0:
            raise ValueError(f"LoRA needs rank >= 1 and alpha > 0, got {self.rank} and {self.alpha}")


@dataclass(frozen=True)
class Adapter:
    """One adapted weight: parameter names of A [rank, in] and B [out, rank], and their scale."""

    down: str
    up: str
    scale: float


def add_adapters(causal_lm: Any, settings: LoraSettings, seed: int) -> None:
    """Put adapters into a transformers model, in place: A random, B zero, both float32, and nothing else trainable.

    Args:
        seed: of A. The same on all ranks, each of which keeps its shard; the caller's random state is left alone.

    Raises:
        ValueError: the model has no module of a name in ``targets``.
    """
    from peft import LoraConfig, inject_adapter_in_model  # seconds, which a full fine-tune need not wait

    targets = settings.targets if isinstance(settings.targets, str) else list(settings.targets)
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=targets, bias="none")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, causal_lm)
    for parameter in causal_lm.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def find_adapters(model: nn.Module) -> dict[str, Adapter]:
    """Adapters by the name of the parameter they add to; empty where there are none."""
    return {
        f"{name}.base_layer.weight": Adapter(
            f"{name}.lora_A.{_NAME}.weight", f"{name}.lora_B.{_NAME}.weight", float(module.scaling[_NAME])
        )
        for name, module in _adapted(model)
    }


def original_name(name: str) -> str:
    """The name a parameter had before adapters were put around its module."""
    return name.replace(".base_layer.", ".")


def merge(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """``weight`` + ``scale`` * ``up`` @ ``down`` in float32 [out, in], a new tensor; equal arguments, equal bits.

    Args:
        weight: [out, in] of any float dtype. down: float32 [rank, in]. up: float32 [out, rank].
    """
    return torch.addmm(weight.float(), up, down, alpha=scale)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes what it would without adapters.

    Their scale is set to 0. peft's own switch also stops them from requiring gradients, which FSDP copies to the
    gathered weights the first time it makes them: they would never be trained.
    """
    layers = [module for _, module in _adapted(model)]
    try:
        for layer in layers:
            layer.set_scale(_NAME, 0.0)
        yield
    finally:
        for layer in layers:
            layer.set_scale(_NAME, 1.0)


def _adapted(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "lora_A")]
