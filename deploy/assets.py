"""What a run needs before its first process starts: a corpus and a model. Built once, then cached."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from common.config import Config
from common.data.rows import read_requests
from common.data.worlds import WORLDS
from common.run_folder import RunFolder
from deploy.errors import LaunchError
from deploy.processes import KEEP_MEMORY
from deploy.search_engine import query_form


def cache_folder() -> Path:
    """Where built worlds, models and indexes are kept: $DEEPRETRIEVAL_CACHE, or the user's cache folder."""
    given = os.environ.get("DEEPRETRIEVAL_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "deepretrieval"


def prepare_assets(config: Config) -> Config:
    """Make corpus and model where they are missing; returns the config with their real paths.

    Building needs torch and minutes, so it happens in a process of its own, with its progress on the terminal.

    Raises:
        LaunchError: a path does not exist, or building failed.
        DataError: the corpus has a broken line.
    """
    corpus = prepare_corpus(config)
    model = prepare_model(config, corpus)
    data = config.data.model_copy(update={"corpus": str(corpus)})
    return config.model_copy(update={"data": data, "model": config.model.model_copy(update={"path": str(model)})})


def prepare_corpus(config: Config) -> Path:
    """The folder of the run's data, with requests in both splits; a generated world is built if it is asked for."""
    corpus = corpus_folder(config)
    for split in (config.data.train_split, config.data.heldout_split):
        if not read_requests(corpus, split):
            raise LaunchError(f"{corpus} has no request in the split {split}: choose another data.*_split")
    return corpus


def corpus_folder(config: Config) -> Path:
    """The folder of the documents that are searched; a generated world is built if it is asked for.

    Raises:
        LaunchError: there is no such folder.
    """
    if config.data.corpus in WORLDS:
        return _build("data", "demo-world", "--name", config.data.corpus, "--seed", str(config.data.demo_seed))
    expanded = os.path.expandvars(config.data.corpus)
    if "$" in expanded:
        variable = expanded.partition("$")[2].partition("/")[0].strip("{}")
        raise LaunchError(f"data.corpus is {config.data.corpus}, but the variable {variable} is not set: export it")
    corpus = Path(expanded).expanduser().resolve()
    if not corpus.is_dir():
        raise LaunchError(
            f"data.corpus {corpus} is not a folder: point it at a BEIR folder (corpus.jsonl, queries.jsonl, qrels/), "
            f"or name a generated world: {', '.join(WORLDS)}"
        )
    return corpus


def prepare_model(config: Config, corpus: Path) -> Path:
    """The initial model: a local folder, a hub id (downloaded), or the small warm-started one (built)."""
    if config.model.path is None:
        shape = config.model.warm_start
        options = {
            "--corpus": corpus,
            "--layers": shape.layers,
            "--width": shape.width,
            "--heads": shape.heads,
            "--vocabulary": shape.vocabulary,
            "--minutes": shape.minutes,
            "--seed": shape.seed,
            "--task": config.task.name,
            "--answers": query_form(config) or "sql",
        }
        arguments = [str(part) for pair in options.items() for part in pair]
        if shape.steps is not None:
            arguments += ["--steps", str(shape.steps)]
        return _build("data", "warm-start", *arguments, *(["--reasoning"] if config.task.reasoning else []))
    found = local_model(config)
    if found is not None:
        return found
    local = Path(os.path.expandvars(config.model.path)).expanduser()
    if local.exists() or config.model.path.startswith((".", "/", "~", "$")):
        raise LaunchError(f"model.path {local} holds no model: config.json is missing")
    return download_model(config.model.path)


def local_model(config: Config) -> Path | None:
    """The folder of the model that `model.path` names, if it is one; None for a hub id and for null."""
    if config.model.path is None:
        return None
    local = Path(os.path.expandvars(config.model.path)).expanduser()
    return local.resolve() if (local / "config.json").is_file() else None


def exported_model(run: Path, step: int | None = None) -> Path:
    """A checkpoint of a run as a Hugging Face folder, the newest where no step is named; made where it is not there.

    Raises:
        CheckpointError: there is no such checkpoint. LaunchError: the export failed.
    """
    from learner.checkpoint import find_checkpoint, step_of

    folder = RunFolder(run)
    checkpoint = find_checkpoint(folder.checkpoints, step)
    exported = folder.exports / checkpoint.name
    if (exported / "config.json").is_file():
        return exported
    return _build("export", str(run), "--step", str(step_of(checkpoint)))


def download_model(hub_id: str) -> Path:
    """The folder of a model of the hub, downloaded where it is not there.

    Raises:
        LaunchError: it cannot be had; says why in one line.
    """
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError:
        raise LaunchError(
            f"{hub_id} is a model of the hub: pip install 'deepretrieval-async[learner]' to download it"
        ) from None
    try:
        return Path(
            snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"])
        )
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise LaunchError(f"cannot download the model {hub_id}: {reason}; or name a local folder") from None


def _build(*arguments: str) -> Path:
    """Run `deepretrieval ARGUMENTS`; its progress goes to the terminal, its last line of output is the path."""
    command = [sys.executable, "-m", "deploy.cli", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **KEEP_MEMORY})
    lines = done.stdout.split("\n")
    path = next((line for line in reversed(lines) if line.strip()), "")
    if done.returncode != 0 or not path:
        raise LaunchError(
            f"`deepretrieval {' '.join(arguments[:2])}` failed (see above): mend what it says and start again"
        )
    return Path(path.strip())
