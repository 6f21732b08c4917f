"""How much memory a rank of the learner will need, from the files of the model alone: before anything is loaded.

An estimate: what grows with the number of parameters is counted exactly (Rajbhandari et al. 2020, ZeRO,
arXiv 1910.02054, section 3.1, for float32 master weights), activations by the tensors that autograd keeps in a
decoder layer with grouped attention and a gated feed-forward part. The output layer is taken to be computed in
chunks. Needs no torch, so that a launcher can say it.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, fields
from pathlib import Path

from common.config import Config

GIB = 2**30
MASTER_BYTES = 4  # of a trained weight, its gradient, and each of Adam's two moments
RUNTIME_BYTES = GIB  # a CUDA context, workspaces of matrix products, fragments: less on a CPU
_COMPUTE_BYTES = {"float32": 4, "bfloat16": 2}
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_GATHERED_LAYERS = 2  # FSDP holds the layer that runs and the one it fetches


@dataclass(frozen=True)
class ModelShape:
    """What of a model costs memory.

    Attributes:
        shapes: of every parameter, by Hugging Face name; a tied output layer is not among them.
        hidden, intermediate: widths of the residual stream and of the feed-forward part.
        key_value: width of keys and of values together.
        layers: decoder layers.
    """

    shapes: dict[str, tuple[int, ...]]
    hidden: int
    intermediate: int
    key_value: int
    layers: int

    @property
    def parameters(self) -> int:
        """All of them."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def layer_parameters(self) -> int:
        """Those of one decoder layer."""
        inside = sum(math.prod(shape) for name, shape in self.shapes.items() if _LAYER.search(name))
        return inside // self.layers

    def adapter_parameters(self, rank: int, targets: str | tuple[str, ...]) -> int:
        """Those of LoRA adapters of this rank: rank * (in + out) for every adapted weight."""
        matrices = {name: shape for name, shape in self.shapes.items() if _LAYER.search(name) and len(shape) == 2}
        if isinstance(targets, tuple):
            matrices = {name: shape for name, shape in matrices.items() if name.split(".")[-2] in targets}
        return rank * sum(sum(shape) for shape in matrices.values())


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank; ``offloaded`` are in the host's memory, all others on the rank's device."""

    weights: float
    gathered: float
    gradients: float
    moments: float
    reference: float
    activations: float
    runtime: float
    offloaded: float = 0.0

    @property
    def device(self) -> float:
        """Bytes on the rank's device together."""
        return sum(getattr(self, field.name) for field in fields(self)) - self.offloaded

    def describe(self) -> str:
        """One line: the sum and its parts in GiB."""
        parts = {field.name: getattr(self, field.name) / GIB for field in fields(self)}
        offloaded = parts.pop("offloaded")
        listed = ", ".join(f"{name} {size:.2f}" for name, size in parts.items() if size >= 0.005)
        host = f"; {offloaded:.2f} GiB in CPU memory" if offloaded else ""
        return f"{self.device / GIB:.2f} GiB per learner rank ({listed}){host}"


def read_shape(model_dir: str | Path) -> ModelShape:
    """The shape of the model in a Hugging Face folder, from config.json and the headers of its safetensors files.

    Raises:
        OSError: a file cannot be read. ValueError: a file is not what its name says, or names no decoder layer.
    """
    folder = Path(model_dir)
    config = json.loads((folder / "config.json").read_text())
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        shapes |= _header_shapes(file)
    if not any(_LAYER.search(name) for name in shapes):
        raise ValueError(f"the safetensors files in {folder} hold no decoder layer")
    try:
        heads = int(config["num_attention_heads"])
        head_width = int(config.get("head_dim") or config["hidden_size"] // heads)
        return ModelShape(
            shapes=shapes,
            hidden=int(config["hidden_size"]),
            intermediate=int(config["intermediate_size"]),
            key_value=2 * head_width * int(config.get("num_key_value_heads") or heads),
            layers=int(config["num_hidden_layers"]),
        )
    except KeyError as error:
        raise ValueError(f"{folder / 'config.json'} has no {error.args[0]}") from None


def estimate_memory(config: Config, shape: ModelShape) -> MemoryEstimate:
    """What a rank of this run's learner needs at its peak, in the backward pass of the largest micro-batch.

    A separate critic is a second model of the same shape, trained beside the policy with all of its weights.
    """
    learner, separate_critic = config.learner, config.algorithm.critic == "separate"
    ranks = learner.processes // learner.replicas  # those that share one copy
    compute, lora = _COMPUTE_BYTES[learner.dtype], learner.lora
    total = shape.parameters
    critic = total if separate_critic else 0
    trained = critic + (total if lora is None else shape.adapter_parameters(lora.rank, lora.targets))
    of_all = {
        "weights": MASTER_BYTES * trained + (0 if lora is None else compute * total),
        "gradients": MASTER_BYTES * trained,
        "moments": 2 * MASTER_BYTES * trained,
        "reference": compute * total if config.algorithm.kl_coef > 0 and lora is None else 0,
    }
    at_rest = {name: size / ranks for name, size in of_all.items()}
    on_device = dict.fromkeys(at_rest, 0.0) if learner.offload == "optimizer" else dict(at_rest)
    if learner.processes > 1:  # a gradient stays whole until the last micro-batch of an update: only then is it reduced
        on_device["gradients"] += MASTER_BYTES * trained
    gathered = _gathered(shape, ranks) * (2 if separate_critic else 1)
    return MemoryEstimate(
        **on_device,
        gathered=compute * gathered,
        activations=learner.micro_batch_tokens * _activations(shape, compute, learner.activation_checkpointing),
        runtime=RUNTIME_BYTES,
        offloaded=sum(at_rest.values()) if learner.offload == "optimizer" else 0.0,
    )


def _gathered(shape: ModelShape, ranks: int) -> int:
    """Parameters held in the compute type for forward and backward pass: one rank gives none back between the two."""
    if ranks == 1:
        return shape.parameters
    outside = shape.parameters - shape.layers * shape.layer_parameters
    return outside + _GATHERED_LAYERS * shape.layer_parameters


def _activations(shape: ModelShape, compute: int, checkpointing: bool) -> float:
    """Bytes per token that the backward pass finds.

    Of a layer: in float32 the two inputs of its norms; in the compute type what the norms give (twice, before and
    after their weight), queries, keys and values, and the attention's output; gate, up, activation and product of
    the feed-forward part.
    """
    layer = 4 * 2 * shape.hidden + compute * (6 * shape.hidden + shape.key_value + 4 * shape.intermediate)
    return shape.layers * compute * shape.hidden + layer if checkpointing else shape.layers * layer


def _header_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes by name: eight bytes of length, then JSON (https://github.com/huggingface/safetensors#format)."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
