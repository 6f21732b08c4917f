"""Looks into safetensors files without loading them, so that a wrong file is refused before it touches the model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from actors.engine import EngineError

Shapes = dict[str, tuple[int, ...]]
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format

# Where it is tied to the input embeddings some writers leave it out and some do not.
OUTPUT_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class WeightFile:
    """A safetensors file whose header was read and whose size is right.

    Attributes:
        path: where it is.
        shapes: shape of each tensor by name.
        bytes: size of the file.
    """

    path: Path
    shapes: Shapes
    bytes: int


def read_weight_file(path: Path) -> WeightFile:
    """Reads names and shapes, and checks that the file is as long as its header says.

    Raises:
        EngineError: there is no such file, or it is no complete safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(size - 8, MAX_HEADER):
                raise ValueError("its header is cut off")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except OSError as error:
        raise EngineError(f"cannot read the weights {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineError(f"{path} is not a safetensors file ({error}); fetch the weights again") from error
    if size != 8 + length + end:
        raise EngineError(f"{path} has {size} bytes instead of {8 + length + end}; fetch the weights again")
    return WeightFile(path, shapes, size)


def read_model_shapes(model_dir: Path) -> Shapes:
    """Shapes of all tensors of a Hugging Face folder; without the output head where it is tied.

    Raises:
        EngineError: it holds no config or no readable safetensors file.
    """
    files = sorted(model_dir.glob("*.safetensors"))
    if not files:
        raise EngineError(f"{model_dir} holds no .safetensors file; other weight formats are not read")
    shapes: Shapes = {}
    for file in files:
        shapes.update(read_weight_file(file).shapes)
    try:
        config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EngineError(f"{model_dir / 'config.json'} cannot be read ({error}): not a model folder") from error
    if config.get("tie_word_embeddings", False):
        shapes.pop(OUTPUT_HEAD, None)
    return shapes


def check_same_model(weights: WeightFile, model: Shapes) -> None:
    """Refuses a file that does not hold exactly the model's tensors; a tied output head may be there or not.

    An engine would load what it finds and silently keep the old values of the rest.

    Raises:
        EngineError: names the first differing tensor.
    """
    for name in sorted(model.keys() | weights.shapes.keys()):
        here, wanted = weights.shapes.get(name), model.get(name)
        if here == wanted or (name == OUTPUT_HEAD and wanted is None):
            continue
        raise EngineError(
            f"{weights.path} does not hold this model's weights: tensor {name} is "
            f"{'missing' if here is None else list(here)}, expected {'none' if wanted is None else list(wanted)}"
        )
