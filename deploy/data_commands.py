"""`deepretrieval data …`: data sets (`dataset_commands`), and worlds and models that are built, not downloaded.

Each command prints its progress on stderr and the path of what it made as the last line of stdout.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common.data.worlds import WORLDS
from deploy import dataset_commands


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `data` with its subcommands."""
    data = commands.add_parser("data", help="data sets: list, fetch, prepare, index; worlds and models built here")
    kinds = data.add_subparsers(title="data commands", required=True, metavar="KIND")
    dataset_commands.add_commands(kinds)
    world = kinds.add_parser("demo-world", help="a generated world: corpus or databases, requests and judgments")
    world.add_argument("--name", choices=sorted(WORLDS), default="demo", help="default: demo (publications)")
    world.add_argument("--seed", type=int, default=0)
    world.add_argument("--out", type=Path, help="folder to make; default: the cache")
    world.set_defaults(handler=_demo_world)
    _add_warm_start(kinds)
    check = kinds.add_parser("check", help="find the rows of a run that can never be scored; runs every SQL gold")
    check.add_argument("config", help="YAML file of the run")
    check.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides")
    check.set_defaults(handler=_check)


def _add_warm_start(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    start = kinds.add_parser("warm-start", help="a small model that knows the answer format and how to copy words")
    start.add_argument("--corpus", type=Path, required=True, help="folder of requests and documents")
    start.add_argument("--task", default="publication_search", help="whose prompts and answers it learns")
    start.add_argument("--answers", choices=["boolean", "words", "sql"], default="boolean", help="form of its queries")
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
    from deploy.assets import cache_folder

    world = WORLDS[arguments.name]
    folder = arguments.out or cache_folder() / "worlds" / f"{arguments.name}-{world.format}-seed{arguments.seed}"
    if not folder.is_dir():
        world.build(folder, arguments.seed)
    print(folder)
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from common.config import load_config
    from deploy.assets import prepare_corpus
    from deploy.row_check import unusable_rows

    config = load_config(Path(arguments.config), arguments.overrides)
    data = config.data.model_copy(update={"corpus": str(prepare_corpus(config))})
    found = unusable_rows(config.model_copy(update={"data": data}))
    for row, reason in found.items():
        print(f"{row}: {reason}")
    print(f"{len(found)} rows can never be scored" if found else "every row can be scored")
    return 1 if found else 0


def _warm_start(arguments: argparse.Namespace) -> int:
    from deploy.assets import cache_folder
    from deploy.terminal import progress_bar
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
        task=arguments.task,
        answers=arguments.answers,
    )
    with progress_bar("Building the small warm-started model") as report:
        path = warm_start(arguments.corpus, arguments.out or cache_folder() / "models", settings, report)
    print(path)
    return 0
