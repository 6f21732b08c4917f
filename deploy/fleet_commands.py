"""The arguments of `deepretrieval scale` and `status`; the commands themselves are imported when they are used."""

from __future__ import annotations

import argparse
from pathlib import Path

MOST_ROLES = 1024  # of one kind


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register both with the command line."""
    scale = commands.add_parser("scale", help="change the number of actors and rewarders of a live run")
    scale.add_argument("run", type=Path, help="the run's folder")
    scale.add_argument("--actors", type=_count, metavar="N", help="actors wanted; default: as many as there are")
    scale.add_argument("--rewarders", type=_count, metavar="N", help="rewarders wanted; default: as many as there are")
    scale.add_argument("--timeout", type=float, default=180.0, help="seconds to wait for it; default: 180")
    scale.set_defaults(handler=_scale)
    status = commands.add_parser(
        "status", help="roles, queues and quota of a run; exit status 1: something is stalled, 2: no answer"
    )
    status.add_argument("run", type=Path, help="the run's folder")
    status.add_argument("--connect", metavar="tcp://HOST:PORT", help="the broker, where it is not the config's")
    status.add_argument("--json", action="store_true", help="as one JSON object")
    status.set_defaults(handler=_status)


def _count(word: str) -> int:
    if not word.isdecimal() or int(word) > MOST_ROLES:
        raise argparse.ArgumentTypeError(f"{word!r} is no number from 0 to {MOST_ROLES}")
    return int(word)


def _scale(arguments: argparse.Namespace) -> int:
    from deploy import scale

    return scale.run(arguments.run, arguments.actors, arguments.rewarders, arguments.timeout)


def _status(arguments: argparse.Namespace) -> int:
    from deploy import status

    return status.run(arguments.run, arguments.connect, arguments.json)
