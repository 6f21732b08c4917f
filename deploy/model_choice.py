"""Which model a command asks, and by which config: flags and words of the command line that name them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from common.config import Config, load_config
from common.run_folder import RunFolder
from deploy.errors import LaunchError
from deploy.models import ENDPOINT_PREFIX, ModelSource, is_run, resolve_model
from deploy.search_process import without_own_server

MODEL_HELP = f"a run (RUN@50: of step 50), a Hugging Face folder, an id of the hub, or {ENDPOINT_PREFIX}MODEL"

# Flags of the commands that rewrite for users.
REWRITING_KEYS: Final = {"task": "task.name", "engine": "search.engine", "corpus": "data.corpus", "url": "search.url"}


def add_endpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """What belongs to a model behind an endpoint."""
    parser.add_argument("--base-url", metavar="URL", help=f"of the endpoint of {ENDPOINT_PREFIX}MODEL")
    parser.add_argument("--api-key-file", metavar="FILE", help="its key (mode 0600); default: $OPENAI_API_KEY")


def add_key_flags(parser: argparse.ArgumentParser, keys: Mapping[str, str], same_as: str = "the same as {}=…") -> None:
    """A flag for each of some keys of the config. keys: flag -> dotted key. same_as: the help, with the key as `{}`."""
    for flag, key in keys.items():
        parser.add_argument(f"--{flag}", help=same_as.format(key))


def flag_overrides(arguments: argparse.Namespace, keys: Mapping[str, str]) -> list[str]:
    """The overrides that those flags stand for."""
    return [f"{key}={json.dumps(value)}" for flag, key in keys.items() if (value := getattr(arguments, flag))]


def config_path(target: Path | None) -> Path | None:
    """The config file of what was named: a config file or a run."""
    return RunFolder(target).config if target is not None and is_run(target) else target


def settled_config(target: Path | None, overrides: Sequence[str]) -> Config:
    """The config of a config file or run with all overrides, without what ended with the run: its own server, its
    recording.

    Raises:
        ConfigError: it cannot be read, or an override makes no sense.
    """
    path = config_path(target)
    gone = [] if path is None else _ended_with_its_run(load_config(path))
    return load_config(path, [*gone, *overrides])


def rewriting_config(model: str, target: Path | None, overrides: Sequence[str], corpus: bool) -> Config:
    """The config by which a model rewrites: of a config file or run, else of the run that the model is, else the
    defaults.

    Args:
        corpus: the engine will be searched: its corpus has to be there, and a generated world is built.

    Raises:
        ConfigError, DataError, LaunchError: it makes no sense; one line that says what to do.
    """
    from deploy.assets import corpus_folder
    from deploy.run_checks import check_values

    if target is None and is_run(run := Path(model.partition("@")[0]).expanduser()):
        target = run
    config = settled_config(target, overrides)
    if not corpus:
        return config
    check_values(config)
    folder = corpus_folder(config) if config.search.url is None else Path(config.data.corpus)
    return config.model_copy(update={"data": config.data.model_copy(update={"corpus": str(folder)})})


def model_of(arguments: argparse.Namespace, target: Path | None, config: Config, otherwise: str = "") -> ModelSource:
    """The model that `--model` names, else that of the run, else the start of the config's run.

    Args:
        otherwise: what else `--model` may be, for the message where nothing names a model.

    Raises:
        LaunchError: there is none; one line that says what to do.
    """
    from deploy.assets import prepare_model

    if arguments.model:
        return resolve_model(arguments.model, arguments.base_url, arguments.api_key_file)
    if target is not None and is_run(target):
        return resolve_model(str(target))
    if target is None:
        raise LaunchError(
            f"name the model: --model RUN, FOLDER, HUB/ID or {ENDPOINT_PREFIX}MODEL{otherwise}; or a config or run"
        )
    if config.model.path is not None:
        return resolve_model(config.model.path)
    return ModelSource(f"{config.run.name} before training", prepare_model(config, Path(config.data.corpus)))


def _ended_with_its_run(config: Config) -> list[str]:
    gone = ["search.url=null", "search.port=0"] if without_own_server(config) != config else []
    return [*gone, *(["search.cache.mode=memory"] if config.search.cache.mode == "record" else [])]
