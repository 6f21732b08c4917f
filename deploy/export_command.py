"""`deepretrieval export RUN`: a checkpoint as a Hugging Face folder that transformers and vLLM load."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from common.config import Config, load_config
from common.run_folder import RunFolder
from common.tracking.heldout import read_evaluation
from deploy.errors import LaunchError
from deploy.model_card import model_card

# What a folder of ours or of the hub holds; nothing else is ever deleted by --force.
_MODEL_FILE = "config.json"


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register it with the command line."""
    export = commands.add_parser("export", help="a checkpoint as a Hugging Face folder for transformers and vLLM")
    export.add_argument("run", type=Path, help="the run's folder")
    export.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. model.path=DIR, where it has moved")
    export.add_argument("--step", type=int, help="default: the newest valid checkpoint")
    export.add_argument("--to", type=Path, help="folder to make; default: exports/step-N in the run's folder")
    export.add_argument("--dtype", choices=["bfloat16", "float32"], help="default: actor.dtype of the run")
    export.add_argument("--force", action="store_true", help="replace a model that is there already")
    export.set_defaults(handler=_export)


def _export(arguments: argparse.Namespace) -> int:
    folder = RunFolder(arguments.run)
    config = load_config(folder.config, arguments.overrides)
    base = _base_model(config)
    from learner.checkpoint import find_checkpoint, step_of

    checkpoint = find_checkpoint(folder.checkpoints, arguments.step)
    target: Path = arguments.to or folder.exports / checkpoint.name
    if _is_made(arguments, target):
        print("It was exported before, by this command or one that needed it; --force does it again", file=sys.stderr)
        print(target)
        return 0
    _require_free(target, arguments.force)
    dtype = arguments.dtype or config.actor.dtype
    temporary = target.with_name(f".{target.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        parameters = _write_model(config, checkpoint, base, temporary, dtype)
        card = model_card(config, step_of(checkpoint), parameters, dtype, read_evaluation(folder.heldout))
        (temporary / "README.md").write_text(card, encoding="utf-8")
        _put_in_place(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(target)
    return 0


def _write_model(config: Config, checkpoint: Path, base: Path, target: Path, dtype: str) -> int:
    import torch

    from learner.adapters import LoraSettings
    from learner.export import ExportedSampling, TrainedAdapters, export_model

    sampling = ExportedSampling(config.sampling.temperature, config.sampling.top_p, config.sampling.max_tokens)
    adapters = None
    if config.learner.lora is not None:
        settings = LoraSettings(**config.learner.lora.model_dump())
        adapters = TrainedAdapters(settings, getattr(torch, config.learner.dtype))
    return export_model(checkpoint, base, target, getattr(torch, dtype), sampling, adapters)


def _base_model(config: Config) -> Path:
    base = Path(config.model.path or "")
    if not config.model.path or not (base / _MODEL_FILE).is_file():
        raise LaunchError(
            f"the model that was trained from is not in {config.model.path}; its shape and tokenizer are needed: "
            "say where it is, model.path=FOLDER"
        )
    return base


def _is_made(arguments: argparse.Namespace, target: Path) -> bool:
    """Whether nothing but the usual export is asked for, and it is in its usual place."""
    usual = arguments.to is None and arguments.dtype is None and not arguments.force
    return usual and (target / _MODEL_FILE).is_file()


def _require_free(target: Path, force: bool) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not force:
        raise LaunchError(f"{target} is there already: choose another --to, or replace it by --force")
    if not (target / _MODEL_FILE).is_file():
        raise LaunchError(f"{target} holds no model, so --force will not delete it: choose another --to")


def _put_in_place(temporary: Path, target: Path) -> None:
    """Nobody ever sees half a model under its name."""
    replaced = target.with_name(f".{target.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        target.rename(replaced)
    temporary.rename(target)
    shutil.rmtree(replaced, ignore_errors=True)
