"""`deepretrieval data …`: worlds and models that are built, not downloaded.

Each command prints its progress on stderr and the path of what it made as the last line of stdout.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

DEMO_WORLD_FORMAT = 1  # part of the cached folder's name: change it whenever the same seed gives another world


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `data` with its subcommands."""
    data = commands.add_parser("data", help="corpora and models that are built here")
    kinds = data.add_subparsers(title="data commands", required=True, metavar="KIND")
    world = kinds.add_parser("demo-world", help="the generated corpus with its requests and judgments")
    world.add_argument("--seed", type=int, default=0)
    world.add_argument("--out", type=Path, help="folder to make; default: the cache")
    world.set_defaults(handler=_demo_world)
    _add_warm_start(kinds)


def _add_warm_start(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    start = kinds.add_parser("warm-start", help="a small model that knows the answer format and how to copy words")
    start.add_argument("--corpus", type=Path, required=True, help="BEIR folder")
    start.add_argument("--out", type=Path, help="folder of built models; default: the cache")
    start.add_argument("--layers", type=int, default=2)
    start.add_argument("--width", type=int, default=128)
    start.add_argument("--heads", type=int, default=4)
    start.add_argument("--vocabulary", type=int, default=4096)
    start.add_argument("--minutes", type=float, default=3.0, help="time limit of the supervised training")
    start.add_argument("--steps", type=int, help="supervised steps; default: what fits the corpus")
    start.add_argument("--seed", type=int, default=0)
    start.add_argument("--reasoning", action="store_true", help="answers begin with a <think> part")
    start.set_defaults(handler=_warm_start)


def _demo_world(arguments: argparse.Namespace) -> int:
    from common.data.demo_world import build_demo_world
    from deploy.assets import cache_folder

    folder = arguments.out or cache_folder() / "worlds" / f"demo-{DEMO_WORLD_FORMAT}-seed{arguments.seed}"
    if not (folder / "corpus.jsonl").is_file():
        build_demo_world(folder, arguments.seed)
    print(folder)
    return 0


def _warm_start(arguments: argparse.Namespace) -> int:
    from deploy.assets import cache_folder
    from learner.warm_start.build import WarmStartSettings, warm_start

    settings = WarmStartSettings(
        layers=arguments.layers,
        width=arguments.width,
        heads=arguments.heads,
        vocabulary=arguments.vocabulary,
        minutes=arguments.minutes,
        steps=arguments.steps,
        seed=arguments.seed,
        reasoning=arguments.reasoning,
    )
    with progress_bar("Building the small warm-started model") as report:
        path = warm_start(arguments.corpus, arguments.out or cache_folder() / "models", settings, report)
    print(path)
    return 0


class progress_bar:  # noqa: N801 - used like a function
    """A progress bar on stderr fed by (share done, what is going on); plain lines where there is no terminal."""

    def __init__(self, title: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
        )
        self._progress = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._title = title
        self._said_at = 0.0

    def __enter__(self) -> Callable[[float, str], None]:
        self._progress.__enter__()
        self._task = self._progress.add_task(self._title, total=1.0)
        return self._report

    def __exit__(self, *exception: object) -> None:
        self._progress.__exit__(None, None, None)

    def _report(self, share: float, text: str) -> None:
        self._progress.update(self._task, completed=share, description=f"{self._title}: {text}")
        if not self._console.is_terminal and time.monotonic() - self._said_at > 10:
            self._said_at = time.monotonic()
            print(f"{self._title}: {text} ({share:.0%})", file=sys.stderr, flush=True)
