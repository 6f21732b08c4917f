"""The files of a Hugging Face encoder: finding them and telling them apart. Imports nothing heavy."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

from rewarders.servers.hosting import SearchServerError
from rewarders.servers.retrieval.sealed import file_digest

# What decides the vectors. Weights are safetensors or nothing: other formats can run code when they are opened.
_FILES: Final = ("*.json", "*.txt", "*.model", "*.safetensors")


def encoder_folder(name: str) -> Path:
    """The folder of an encoder: `name` itself, or the hub's files in the local cache, fetched if need be.

    Raises:
        SearchServerError: neither is to be had, or the weights are not safetensors.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = _from_hub(name)
    if not (folder / "config.json").is_file():
        raise SearchServerError(f"encoder {name}: no config.json there: name the folder of a Hugging Face encoder")
    if not any(folder.glob("*.safetensors")):
        raise SearchServerError(
            f"encoder {name}: no safetensors weights, and no other format is opened: "
            "load it where you trust it and call save_pretrained"
        )
    return folder


def encoder_identity(folder: Path) -> str:
    """SHA-256 over the files that decide the vectors: equal for equal encoders, wherever they lie."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in _FILES for path in folder.glob(pattern)}):
        digest.update(f"{path.name} {file_digest(path)}\n".encode())
    return digest.hexdigest()


def _from_hub(name: str) -> Path:
    missing = f"encoder {name}: no such folder"
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise SearchServerError(f"{missing}: name one, or null for an encoder made from the corpus")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(_FILES)))
    except Exception as error:  # offline, unknown, gated: the hub's own words say which
        raise SearchServerError(
            f"{missing}, and the hub does not give it ({_one_line(error)}): "
            "name a folder, or null for an encoder made from the corpus"
        ) from None


def _one_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
