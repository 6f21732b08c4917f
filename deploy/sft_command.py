"""`deepretrieval sft CONFIG --rows FILE`: a start for RL that has seen how to answer."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from common.config import Config, load_config
from deploy.errors import LaunchError

if TYPE_CHECKING:
    from common.data.demonstrations import Demonstration
    from learner.sft import Example, SftSettings

RECORD = "sft.json"  # in the model's folder: what it was made from, and how far that went


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register it with the command line."""
    sft = commands.add_parser("sft", help="supervised warm start on requests with answers: a model to begin RL from")
    sft.add_argument("config", help="YAML file of the run that is to follow: its task, its model")
    sft.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, e.g. model.path=DIR")
    sft.add_argument("--rows", type=Path, required=True, help="JSON lines: request, reasoning, query (docs/sft.md)")
    sft.add_argument("--out", type=Path, help="folder to make; default: models/NAME-sft, after the run")
    sft.add_argument("--epochs", type=_positive, default=2.0, help="passes over the rows; default: 2")
    sft.add_argument("--lr", type=_positive, default=1e-5, help="peak learning rate of AdamW; default: 1e-5")
    sft.add_argument("--batch", type=_count, default=16, help="rows per optimizer step; default: 16")
    sft.add_argument("--max-length", type=_count, help="most tokens of a row; default: actor.max_model_len")
    sft.add_argument("--force", action="store_true", help="replace a model that `sft` has written there before")
    sft.set_defaults(handler=_sft)


def _sft(arguments: argparse.Namespace) -> int:
    from common.data.demonstrations import read_demonstrations
    from common.tasks.from_config import task_of

    config = load_config(Path(arguments.config), arguments.overrides)
    target: Path = arguments.out or Path("models") / f"{config.run.name}-sft"
    _require_free(target, arguments.force)
    task = task_of(config)
    demonstrations = read_demonstrations(arguments.rows, task)
    _require_one_device()
    model_dir = _model_to_start_from(config)
    longest = arguments.max_length or config.actor.max_model_len
    examples = _that_fit(demonstrations, model_dir, task.response_prefix, longest)
    settings = _settings(config, arguments)
    print(f"{len(examples)} rows, {settings.epochs:g} epochs, from {model_dir}", file=sys.stderr)
    losses = _train_and_write(config, model_dir, examples, settings, target, arguments.rows)
    print(f"loss per answer token: {losses[0]:.3f} at first, {losses[-1]:.3f} at last", file=sys.stderr)
    print(target)
    return 0


def _settings(config: Config, arguments: argparse.Namespace) -> SftSettings:
    from learner.adapters import LoraSettings
    from learner.sft import SftSettings

    learner = config.learner
    return SftSettings(
        epochs=arguments.epochs,
        lr=arguments.lr,
        batch=arguments.batch,
        micro_batch_tokens=learner.micro_batch_tokens,
        compute_dtype=learner.dtype,
        activation_checkpointing=learner.activation_checkpointing,
        lora=None if learner.lora is None else LoraSettings(**learner.lora.model_dump()),
        seed=config.run.seed,
    )


def _model_to_start_from(config: Config) -> Path:
    from deploy.assets import prepare_corpus, prepare_model

    # Only the small model is made from the corpus; any other start needs none.
    corpus = prepare_corpus(config) if config.model.path is None else Path(config.data.corpus)
    return prepare_model(config, corpus)


def _that_fit(
    demonstrations: list[Demonstration], model_dir: Path, response_prefix: str, longest: int
) -> list[Example]:
    from learner.sft import encode

    try:
        examples = encode(demonstrations, model_dir, response_prefix)
    except ValueError as error:
        raise LaunchError(str(error)) from None
    fitting = [example for example in examples if example.tokens <= longest]
    if not fitting:
        raise LaunchError(f"every row has more than {longest} tokens: raise --max-length")
    if left_out := len(examples) - len(fitting):
        print(f"{left_out} of {len(examples)} rows have more than {longest} tokens and are left out", file=sys.stderr)
    return fitting


def _train_and_write(
    config: Config, model_dir: Path, examples: list[Example], settings: SftSettings, target: Path, rows: Path
) -> list[float]:
    import torch

    from common.data.worlds.folders import whole_folder
    from deploy.terminal import progress_bar
    from learner.export import ExportedSampling, model_with, write_model
    from learner.sft import fine_tune

    try:
        with progress_bar("Supervised warm start") as report:
            weights, losses = fine_tune(model_dir, examples, settings, report)
    except FloatingPointError as error:
        raise LaunchError(str(error)) from None
    dtype: torch.dtype = getattr(torch, config.actor.dtype)
    model = model_with({name: weight.to(dtype) for name, weight in weights.items()}, model_dir, dtype, model_dir)
    sampling = ExportedSampling(config.sampling.temperature, config.sampling.top_p, config.sampling.max_tokens)
    with whole_folder(target) as folder:
        write_model(model, model_dir, folder, sampling)
        record = {
            "model": str(model_dir),
            "rows": str(rows),
            "rows_used": len(examples),
            "epochs": settings.epochs,
            "lr": settings.lr,
            "batch": settings.batch,
            "seed": settings.seed,
            "losses": losses,
        }
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return losses


def _require_free(target: Path, force: bool) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / RECORD).is_file():
        raise LaunchError(f"{target} holds something that `sft` has not written: choose another --out")
    if not force:
        raise LaunchError(f"{target} is there already: choose another --out, or replace it by --force")


def _require_one_device() -> None:
    """On several, transformers would split every batch in a way of its own."""
    import torch

    if torch.cuda.device_count() > 1:
        raise LaunchError("the warm start runs on one GPU: say which one, e.g. CUDA_VISIBLE_DEVICES=0")


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above zero")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of them")
    return value
