"""`deepretrieval doctor`: what is installed, reachable and configured, and what to do about what is not."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from deploy.checks import Check, check_key_file, engine_in_use, run_checks

_STYLE = {"OK": "green", "missing": "dim", "broken": "bold red", "warning": "yellow"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--deep", action="store_true", help="really import the packages (minutes), call PubMed")
    parser.add_argument("--config", help="check the search.api_key_file of this config too")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")


def run(deep: bool = False, as_json: bool = False, config: str | None = None) -> int:
    """Print every check. Returns the exit code: 0, or 1 where a part of the base install does not work.

    Raises:
        ConfigError: `config` is named and cannot be read.
    """
    checks = run_checks(deep) + (_checks_of(config) if config else [])
    broken = base_problems(checks)
    if as_json:
        print(json.dumps(as_object(checks), ensure_ascii=False))
    else:
        _print_table(checks)
        print(verdict(checks))
    return 1 if broken else 0


def _checks_of(config: str) -> list[Check]:
    from common.config import load_config

    path = load_config(Path(config)).search.api_key_file
    return [check_key_file(path)] if path else []


def base_problems(checks: Sequence[Check]) -> list[Check]:
    """The checks of the base install that do not hold."""
    return [check for check in checks if check.group == "base" and check.status in ("missing", "broken")]


def as_object(checks: list[Check]) -> dict[str, object]:
    """The whole result in JSON's types."""
    return {
        "ok": not base_problems(checks),
        "engine": engine_in_use(checks),
        "checks": [asdict(check) for check in checks],
    }


def verdict(checks: list[Check]) -> str:
    """One line: whether training can start here, and with which engine."""
    if broken := base_problems(checks):
        return f"The base install is broken: {', '.join(check.name for check in broken)}."
    engine = engine_in_use(checks)
    if engine is None:
        return "Broker, rewarders and search server can run; training cannot: pip install -e '.[learner]'."
    return f"Ready to train; actor.engine=auto takes {engine}."


def _print_table(checks: Sequence[Check]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:  # rich is what may be broken
        for check in checks:
            print(f"{check.status:8} {check.name:16} {check.detail} {check.advice}")
        return
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    for heading in ("", "what", "state", "found", "what to do"):
        table.add_column(heading, no_wrap=heading in ("what", "state"), overflow="fold")
    group = ""
    for check in checks:
        shown = "" if check.group == group else check.group
        group = check.group
        state = Text(check.status, style=_STYLE[check.status])
        table.add_row(Text(shown, style="bold"), check.name, state, Text(check.detail), Text(check.advice))
    Console().print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m deploy.doctor`."""
    parser = argparse.ArgumentParser(prog="deepretrieval doctor", description=__doc__)
    add_arguments(parser)
    options = parser.parse_args(argv)
    return run(deep=options.deep, as_json=options.json, config=options.config)


if __name__ == "__main__":
    sys.exit(main())
