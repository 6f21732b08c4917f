"""What a folder in the format of sentence-transformers says about its encoder: modules.json, and a folder per module.

Imports nothing heavy. Format: https://www.sbert.net/docs/package_reference/sentence_transformer/models.html
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import msgspec

from rewarders.servers.hosting import SearchServerError
from rewarders.servers.retrieval.dense_wire import DenseSettings, Pooling

_APPLIED: Final = frozenset({"Transformer", "Pooling", "Normalize"})
_MODES: Final[dict[str, Pooling]] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}
_MODES_BY_NAME: Final[dict[str, Pooling]] = {"mean": "mean", "cls": "cls", "lasttoken": "last"}


def refuse_other_layers(folder: Path) -> None:
    """sentence-transformers can put more layers behind the pooling; without them the vectors would be wrong.

    Raises:
        SearchServerError: the folder has one, or its modules.json is none.
    """
    for kind, _ in _modules(folder):
        if kind not in _APPLIED:
            raise SearchServerError(
                f"encoder {folder}: modules.json adds a {kind} layer, which is not applied here: name another encoder"
            )


def with_folders_own(settings: DenseSettings, folder: Path) -> DenseSettings:
    """The settings, with `pooling` and `normalize` of the folder where they are None; where it says nothing either,
    mean and unit vectors.

    Raises:
        SearchServerError: the folder says what is not done here, or cannot be understood.
    """
    modules = _modules(folder)
    pooling, normalize = settings.pooling, settings.normalize
    if pooling is None:
        places = [place for kind, place in modules if kind == "Pooling"]
        pooling = _pooling(folder, folder / places[0] / "config.json") if places else "mean"
    if normalize is None:
        normalize = not modules or any(kind == "Normalize" for kind, _ in modules) or _by_cosine(folder)
    return msgspec.structs.replace(settings, pooling=pooling, normalize=normalize)


def _modules(folder: Path) -> list[tuple[str, str]]:
    """Kind and subfolder of every module; none if the folder is a plain one of transformers."""
    path = folder / "modules.json"
    if not path.is_file():
        return []
    try:
        return [(str(module["type"]).rpartition(".")[2], str(module.get("path", ""))) for module in _read(path)]
    except (TypeError, KeyError, AttributeError):
        raise SearchServerError(f"encoder {folder}: modules.json lists no modules: save the encoder anew") from None


def _pooling(folder: Path, path: Path) -> Pooling:
    stated: dict[str, Any] = _read(path)
    named = stated.get("pooling_mode")
    names = [named] if named else [key for key, on in stated.items() if key.startswith("pooling_mode_") and on is True]
    known = [_MODES.get(name) or _MODES_BY_NAME.get(name) for name in names]
    if len(known) != 1 or known[0] is None:
        raise SearchServerError(
            f"encoder {folder}: pools by {' and '.join(map(str, names)) or 'nothing'}, which is not done here: set "
            "search.dense.pooling, or name another encoder"
        )
    return known[0]


def _by_cosine(folder: Path) -> bool:
    """Whether the encoder's vectors are meant to be compared by their angle, though no module shortens them."""
    path = folder / "config_sentence_transformers.json"
    return path.is_file() and _read(path).get("similarity_fn_name") == "cosine"


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SearchServerError(f"encoder {path.parent}: {path.name} cannot be read ({error})") from None
