"""`deepretrieval train` (this machine) and `launch` (a cluster): everything for one run."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

from common.config import Config, load_config, to_yaml
from deploy.run_checks import check_rows, check_values
from deploy.sites import LocalSite, Site

Subparsers = argparse._SubParsersAction  # what add_subparsers returns; it has no public name


def add_commands(commands: Subparsers[argparse.ArgumentParser]) -> None:
    """Register both with the command line."""
    train = commands.add_parser("train", help="everything for one run on this machine, with live progress")
    _add_arguments(train)
    train.set_defaults(handler=_train)
    launch = commands.add_parser("launch", help="everything for one run on a cluster, with live progress")
    _add_arguments(launch)
    launch.add_argument("--on", required=True, choices=["ray"], help="what starts the roles")
    launch.add_argument(
        "--address",
        default="auto",
        help="of the Ray cluster: auto (the one this machine belongs to), HOST:PORT, ray://HOST:PORT, "
        "or local (start one here); default: auto",
    )
    launch.set_defaults(handler=_launch)


def add_config(parser: argparse.ArgumentParser) -> None:
    """The arguments that name a configuration."""
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, e.g. learner.steps=50")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of this run")
    parser.add_argument("--dry-run", action="store_true", help="check the config, print it resolved, and stop")


def _train(arguments: argparse.Namespace) -> int:
    from actors.engine import choose_engine

    return _run(arguments, LocalSite, lambda config: choose_engine(config.actor.engine))


def _launch(arguments: argparse.Namespace) -> int:
    from actors.engine import choose_engine

    def connect() -> Site:
        from deploy.ray_site import RaySite

        return RaySite.connect(arguments.address)

    def engine_of(config: Config) -> str:
        """An engine that is named need not be installed here, where no actor may ever run."""
        return choose_engine("auto") if config.actor.engine == "auto" else config.actor.engine

    return _run(arguments, connect, engine_of)


def _run(arguments: argparse.Namespace, connect: Callable[[], Site], engine_of: Callable[[Config], str]) -> int:
    config = load_config(Path(arguments.config), arguments.overrides)
    check_values(config)
    if arguments.dry_run:
        print(to_yaml(config), end="")
        print(f"# memory: {_learner_memory(config)}")
        return 0
    from rich.console import Console

    from deploy.assets import prepare_assets
    from deploy.launch import LaunchedRun
    from deploy.live_run import RunLock
    from deploy.row_check import without_unusable_rows
    from deploy.run_setup import require_checkpoint, run_folder
    from deploy.service_rules import check_service

    if arguments.resume:
        require_checkpoint(run_folder(config))
    warnings = check_service(config)
    engine = engine_of(config)
    console = Console()
    for warning in warnings:
        console.print(f"warning: {warning}", style="yellow", highlight=False)
    console.print(f"Run [bold]{config.run.name}[/]: rollouts by [bold]{engine}[/]", highlight=False)
    config = prepare_assets(config)
    check_rows(config)
    config = without_unusable_rows(config, arguments.resume, console)
    with RunLock(run_folder(config).path), contextlib.closing(connect()) as site:
        logging.getLogger().handlers = _launcher_log(config)
        return asyncio.run(LaunchedRun(config, engine, arguments.resume, console, site).run())


def _learner_memory(config: Config) -> str:
    """What the learner will need, as far as it can be said without downloading or building the model."""
    from deploy.assets import local_model
    from learner.memory import estimate_memory, read_shape

    folder = local_model(config)
    if folder is None:
        return f"known once the model is here ({config.model.path or 'built on first use'})"
    try:
        return estimate_memory(config, read_shape(folder)).describe()
    except (OSError, ValueError) as error:
        return f"unknown: {error}"


def _launcher_log(config: Config) -> list[logging.Handler]:
    """The launcher's own log goes to a file: the terminal belongs to the progress display."""
    from deploy.run_setup import run_folder

    folder = run_folder(config)
    folder.logs.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder.logs / "launcher.txt", mode="w")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    return [handler]
