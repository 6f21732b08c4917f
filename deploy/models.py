"""Which model is meant: a run of ours, a Hugging Face folder, an id of the hub, or an OpenAI-compatible endpoint."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from common.run_folder import RunFolder
from deploy.assets import download_model, exported_model
from deploy.errors import LaunchError
from deploy.model_card import base_model_name

ENDPOINT_PREFIX: Final = "openai:"
KEY_VARIABLE: Final = "OPENAI_API_KEY"
DEFAULT_BASE_URL: Final = "https://api.openai.com/v1"
# Of every weight file so much is read to tell models apart: hashing all of a large one takes minutes.
_BLOCKS: Final = 64
_BLOCK_BYTES: Final = 1 << 16


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server.

    Attributes:
        base_url: what `/chat/completions` is appended to.
        model: as the server calls it.
        api_key: "" for none. Kept out of `repr`.
    """

    base_url: str
    model: str
    api_key: str = ""

    def __repr__(self) -> str:
        return f"Endpoint({self.base_url!r}, {self.model!r})"


@dataclass(frozen=True)
class ModelSource:
    """A model that can be asked: exactly one of `folder` and `endpoint` is set.

    Attributes:
        name: for tables and names of folders.
        folder: config, tokenizer and safetensors, as transformers and vLLM load them.
    """

    name: str
    folder: Path | None = None
    endpoint: Endpoint | None = None

    def fingerprint(self) -> str:
        """What tells this model from others, also where another one takes its folder."""
        if self.endpoint is not None:
            return f"{self.endpoint.base_url} {self.endpoint.model}"
        assert self.folder is not None
        digest = hashlib.sha256()
        files = [*self.folder.glob("*.safetensors"), *self.folder.glob("*.bin"), *self.folder.glob("*.json")]
        for path in sorted(files):
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            _hash_sample(path, digest)
        return digest.hexdigest()[:32]


def resolve_model(text: str, base_url: str | None = None, api_key_file: str | None = None) -> ModelSource:
    """The model that `text` names.

    Args:
        text: a run's folder (its newest checkpoint; `runs/demo@50`: of step 50), a Hugging Face folder, an id of the
            hub, or `openai:MODEL`.
        base_url: of the endpoint; default: OpenAI's own.
        api_key_file: holds the endpoint's key (mode 0600); default: $OPENAI_API_KEY.

    Raises:
        LaunchError: there is no such model, or it cannot be had; one line that says what to do. CheckpointError: the
            run has no such checkpoint.
    """
    if text.startswith(ENDPOINT_PREFIX):
        return _endpoint(text.removeprefix(ENDPOINT_PREFIX), base_url or DEFAULT_BASE_URL, api_key_file)
    if base_url is not None:
        raise LaunchError(f"--base-url is for an endpoint: name its model as {ENDPOINT_PREFIX}MODEL, not {text}")
    path = Path(os.path.expandvars(text)).expanduser()
    if is_run(path):
        return _of_run(path, None)
    run, _, step = str(path).rpartition("@")
    if run and is_run(Path(run)):
        if not step.isascii() or not step.isdigit():
            raise LaunchError(f"{text}: after the @ stands the step of a checkpoint, a number")
        return _of_run(Path(run), int(step))
    if (path / "config.json").is_file():
        return ModelSource(base_model_name(str(path.resolve()))[0], path.resolve())
    if path.exists() or text.startswith((".", "/", "~", "$")) or text.count("/") > 1:
        raise LaunchError(f"{path} is no model: neither a run (config.yaml, checkpoints) nor a folder with config.json")
    return ModelSource(text, download_model(text))


def read_key(file: str | None, variable: str) -> str:
    """A key from a file (mode 0600), else from the environment; "" for none.

    Raises:
        LaunchError: the file holds none, or others may read it.
    """
    from rewarders.engines.api_keys import ApiKeyError, key_from_environment, key_from_file

    try:
        return key_from_file(file) if file else key_from_environment(variable)
    except ApiKeyError as error:
        raise LaunchError(error.reason) from None


def is_run(path: Path) -> bool:
    """Whether this is the folder of a run."""
    return RunFolder(path).config.is_file()


def _of_run(run: Path, step: int | None) -> ModelSource:
    folder = exported_model(run, step).resolve()
    return ModelSource(f"{run.resolve().name}@{int(folder.name.removeprefix('step-').partition('.')[0])}", folder)


def _endpoint(model: str, base_url: str, api_key_file: str | None) -> ModelSource:
    if not model:
        raise LaunchError(f"{ENDPOINT_PREFIX} names no model: write {ENDPOINT_PREFIX}MODEL")
    if not base_url.startswith(("http://", "https://")):
        raise LaunchError(f"the base URL {base_url} must begin with http:// or https://")
    key = read_key(api_key_file, KEY_VARIABLE)
    return ModelSource(model, endpoint=Endpoint(base_url.rstrip("/"), model, key))


def _hash_sample(path: Path, digest: hashlib._Hash) -> None:
    """Blocks at even distances: training moves all weights, if some by less than their last bit."""
    size = path.stat().st_size
    step = max(_BLOCK_BYTES, size // _BLOCKS)
    with path.open("rb") as file:
        for start in range(0, size, step):
            file.seek(start)
            digest.update(file.read(_BLOCK_BYTES))
