"""The command line: `deepretrieval COMMAND …`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from common.config import Config, load_config
from common.run_folder import RunFolder
from deploy import (
    data_commands,
    doctor,
    export_command,
    fleet_commands,
    run_commands,
    search_server_command,
    sft_command,
)
from deploy.errors import exit_status, user_message
from deploy.evaluation import command as evaluation_command
from deploy.evaluation import compare_command
from deploy.open_files import allow_open_files
from deploy.rewriting import command as rewriting_command
from deploy.serving import command as serving_command

Handler = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; errors the user can mend are one line and exit status 1 (a role: 78 where starting it
    again is of no use)."""
    arguments = _parse(argv)
    logging.raiseExceptions = bool(os.environ.get("DEEPRETRIEVAL_DEBUG"))  # a log on a full disk is no traceback
    rank = f" rank {os.environ['RANK']}" if "RANK" in os.environ else ""
    logging.basicConfig(
        level=logging.DEBUG if os.environ.get("DEEPRETRIEVAL_DEBUG") else logging.INFO,
        format=f"%(asctime)s %(levelname)s{rank} %(name)s: %(message)s",
        stream=sys.stderr,
    )
    if getattr(arguments, "parent", None):
        from deploy.roles import end_with_parent

        end_with_parent(arguments.parent, arguments.parent_grace)
    # Some commands import torch before vLLM can ask for quiet: warnings of how memory is bound concern nobody.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    allow_open_files()
    handler: Handler = arguments.handler
    try:
        return handler(arguments)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        message = user_message(error)
        if message is None or os.environ.get("DEEPRETRIEVAL_DEBUG"):
            raise
        print(f"error: {message}", file=sys.stderr)
        return exit_status(error)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Like `parse_args`, but overrides may also stand after options."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(_with_bare_resume(list(sys.argv[1:] if argv is None else argv)))
    anywhere = hasattr(arguments, "words_anywhere")  # this command sorts its words itself
    strangers = [word for word in rest if word.startswith("-") or not (anywhere or "=" in word)]
    if strangers or (rest and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(strangers or rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _with_bare_resume(words: list[str]) -> list[str]:
    """The learner's `--resume` takes a word of its own only: argparse would take the config or an override too."""
    if words[:1] != ["learner"]:
        return words
    following = [*words[1:], ""]
    return [
        f"{word}=must" if word == "--resume" and after not in ("must", "auto") else word
        for word, after in zip(words, following, strict=True)
    ]


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="deepretrieval", description="Train LLM query rewriters by asynchronous RL against real search engines."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    run_commands.add_commands(commands)
    _add_roles(commands)
    _add_parent(search_server_command.add_command(commands))
    fleet_commands.add_commands(commands)
    data_commands.add_commands(commands)
    _add_report(commands)
    sft_command.add_command(commands)
    export_command.add_command(commands)
    evaluation_command.add_command(commands)
    compare_command.add_command(commands)
    rewriting_command.add_command(commands)
    serving_command.add_command(commands)
    check = commands.add_parser("doctor", help="what is installed and configured, and what to do about what is not")
    doctor.add_arguments(check)
    check.set_defaults(handler=lambda arguments: doctor.run(arguments.deep, arguments.json, arguments.config))
    return parser


# ---------------------------------------------------------------------- roles


def _add_roles(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    broker = commands.add_parser("broker", help="the broker of a run")
    _add_role_arguments(broker, connects=False)
    broker.add_argument("--port", type=int, default=None, help="port to bind; default: broker.port of the config")
    broker.set_defaults(handler=_broker)
    for name, handler in (("actor", _actor), ("rewarder", _rewarder)):
        role = commands.add_parser(name, help=f"one {name}, on any host")
        _add_role_arguments(role, connects=True)
        role.add_argument("--name", help="name in the fleet; default: role, host and process")
        role.set_defaults(handler=handler)
    learner = commands.add_parser("learner", help="the learner of a run")
    _add_role_arguments(learner, connects=True)
    learner.add_argument("--host", default="127.0.0.1", help="address at which actors reach the weights")
    learner.add_argument(
        "--resume",
        nargs="?",
        choices=["must", "auto"],
        const="must",
        default="no",
        help="go on from the newest valid checkpoint; auto: begin anew where there is none (default: must)",
    )
    learner.add_argument("--processes", type=int, help="ranks on this host; default: learner.processes of the config")
    learner.set_defaults(handler=_learner)


def _add_role_arguments(parser: argparse.ArgumentParser, connects: bool) -> None:
    run_commands.add_config(parser)
    parser.add_argument("--keys", type=Path, help="keys folder of the run; default: keys/ beside the config")
    _add_parent(parser)
    if connects:
        parser.add_argument("--connect", required=True, metavar="tcp://HOST:PORT", help="the broker's address")


def _add_parent(parser: argparse.ArgumentParser) -> None:
    """For launchers: end when that process is gone, after so many seconds to tidy up."""
    parser.add_argument("--parent", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--parent-grace", type=float, default=10.0, help=argparse.SUPPRESS)


def _run_of(arguments: argparse.Namespace) -> tuple[Config, RunFolder, Path]:
    config = load_config(Path(arguments.config), arguments.overrides)
    folder = RunFolder(Path(arguments.config).resolve().parent)
    return config, folder, arguments.keys or folder.keys


def _broker(arguments: argparse.Namespace) -> int:
    from deploy.roles import run_broker

    config, _, keys = _run_of(arguments)
    run_broker(config, keys, config.broker.port if arguments.port is None else arguments.port)
    return 0


def _actor(arguments: argparse.Namespace) -> int:
    from deploy.roles import run_actor

    config, _, keys = _run_of(arguments)
    run_actor(config, keys, arguments.connect, arguments.name)
    return 0


def _rewarder(arguments: argparse.Namespace) -> int:
    from deploy.roles import run_rewarder

    config, _, keys = _run_of(arguments)
    run_rewarder(config, keys, arguments.connect, arguments.name)
    return 0


def _learner(arguments: argparse.Namespace) -> int:
    from deploy.ranks import run_ranks
    from deploy.roles import end_with_parent, run_learner_role

    if arguments.processes is not None:
        arguments.overrides = [*arguments.overrides, f"learner.processes={arguments.processes}"]
    config, folder, _ = _run_of(arguments)
    is_rank = "WORLD_SIZE" in os.environ
    if config.learner.processes > 1 and not is_rank:
        return run_ranks(_rank_command(arguments), config.learner.processes)
    if is_rank:
        end_with_parent(os.getppid(), 0.0)  # a rank whose launcher was killed must not train on
    completed = run_learner_role(config, folder, arguments.connect, arguments.host, arguments.resume)
    return 0 if completed else 130


def _rank_command(arguments: argparse.Namespace) -> list[str]:
    """This same command, for every rank."""
    command = [sys.executable, "-m", "deploy.cli", "learner", arguments.config, *arguments.overrides]
    command += ["--connect", arguments.connect, "--host", arguments.host]
    return command + ([f"--resume={arguments.resume}"] if arguments.resume != "no" else [])


# ---------------------------------------------------------------------- the rest


def _add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    report = commands.add_parser("report", help="plots, table of rewrites and summary of a run, written again")
    report.add_argument("run", type=Path, help="the run's folder")
    report.set_defaults(handler=_report)


def _report(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from deploy.report import print_report, write_report

    print_report(write_report(arguments.run), Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
