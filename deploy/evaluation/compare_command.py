"""`deepretrieval compare`: evaluations that are finished, in one table."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from common.tracking.jsonl import replace_file
from deploy.errors import LaunchError

if TYPE_CHECKING:
    from deploy.evaluation.compare import Dataset, Evaluation

_PICTURES: Final = (".png", ".pdf", ".svg")


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register it with the command line."""
    parser = commands.add_parser(
        "compare", help="several evaluations in one table: methods as rows, datasets as columns"
    )
    parser.add_argument(
        "evaluations",
        nargs="+",
        metavar="[NAME=]FOLDER",
        help="what `eval` wrote; NAME: of the model's row, so that the models of several datasets share one",
    )
    parser.add_argument(
        "--against", metavar="NAME", help="the row that all others are compared with; default: the first model's"
    )
    parser.add_argument(
        "--metric", action="append", default=[], help="instead of the task's own; may be given several times"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table there too")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the bars with their intervals")
    parser.set_defaults(handler=_compare)


def _compare(arguments: argparse.Namespace) -> int:
    from deploy.evaluation.compare import datasets_of
    from deploy.evaluation.compare_table import comparison

    if arguments.plot is not None and arguments.plot.suffix.lower() not in _PICTURES:
        raise LaunchError(f"--plot {arguments.plot}: name a file that ends in {', '.join(_PICTURES)}")
    evaluations = [_read(word) for word in arguments.evaluations]
    datasets = datasets_of(evaluations, list(dict.fromkeys(arguments.metric)))
    text = comparison(datasets, _reference(arguments.against, evaluations, datasets))
    print(text, end="")
    if arguments.out is not None:
        replace_file(arguments.out, text.encode())
    if arguments.plot is not None:
        from deploy.evaluation.compare_plot import write_comparison_plot

        write_comparison_plot(datasets, arguments.plot)
    return 0


def _read(word: str) -> Evaluation:
    from deploy.evaluation.compare import read_evaluation

    name, sign, folder = word.partition("=")
    if not sign or Path(word).is_dir():
        return read_evaluation(Path(word), None)
    if not name.strip():
        raise LaunchError(f"{word}: write a name before the =, or the folder alone")
    return read_evaluation(Path(folder), name.strip())


def _reference(wanted: str | None, evaluations: Sequence[Evaluation], datasets: Sequence[Dataset]) -> str:
    """The row that others are compared with, by its label or by a baseline's name."""
    from deploy.evaluation.compare import baseline_row, rows_of

    if wanted is None:
        return evaluations[0].label
    rows = rows_of(datasets)
    for label in (wanted, baseline_row(wanted)):
        if label in rows:
            return label
    raise LaunchError(f"--against {wanted}: there is no such row; there are {', '.join(rows)}")
