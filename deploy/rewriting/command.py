"""`deepretrieval rewrite "…"`: the query for a request, for each of a file, and what it brings."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, TextIO

from common.config import Config
from deploy.errors import LaunchError
from deploy.model_choice import (
    MODEL_HELP,
    REWRITING_KEYS,
    add_endpoint_arguments,
    add_key_flags,
    flag_overrides,
    rewriting_config,
)
from deploy.models import ModelSource, resolve_model
from deploy.rewriting.results import Found, Rewrite

if TYPE_CHECKING:
    from deploy.rewriting.rewriter import AsyncRewriter
    from deploy.rewriting.task_rewriter import Wish

SHOWN_RESULTS: Final = 5


@dataclass(frozen=True)
class Request:
    """One line of a file of requests."""

    text: str
    database: str = ""
    knowledge: str = ""
    max_date: str | None = None


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register it with the command line."""
    parser = commands.add_parser("rewrite", help="the query that a model writes for a request, and what it brings")
    parser.add_argument(
        "requests", nargs="*", metavar="REQUEST", help='a request in quotes; "-": one per line of stdin'
    )
    parser.add_argument("--model", required=True, help=MODEL_HELP)
    add_endpoint_arguments(parser)
    parser.add_argument("--config", type=Path, help="task and engine by this file or run; default: the model's run")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="dotted overrides of the config")
    add_key_flags(parser, REWRITING_KEYS, "the same as --set {}=…")
    parser.add_argument("--database", default="", help="of requests for SQL: its name below the corpus")
    parser.add_argument("--search", action="store_true", help="search for the query, and show the first results")
    parser.add_argument("--top", type=int, default=SHOWN_RESULTS, help=f"so many; default: {SHOWN_RESULTS}")
    parser.add_argument("--file", type=Path, help="requests: a line each, or JSON lines with the key request")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write JSON lines, in the order of the requests")
    parser.add_argument("--json", action="store_true", help="JSON lines on the terminal")
    parser.add_argument("--temperature", type=float, default=0.0, help="default: 0 (greedy)")
    parser.add_argument("--max-tokens", type=int, help="of a response; default: sampling.max_tokens of the config")
    parser.add_argument("--free", action="store_true", help="do not hold the model to the form of an answer")
    parser.set_defaults(handler=_rewrite)


def _rewrite(arguments: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    requests = list(read_requests(arguments))
    if not requests:
        raise LaunchError('name a request: deepretrieval rewrite "…" --model MODEL, or --file FILE')
    source = resolve_model(arguments.model, arguments.base_url, arguments.api_key_file)
    overrides = [*flag_overrides(arguments, REWRITING_KEYS), *arguments.set]
    config = rewriting_config(arguments.model, arguments.config, overrides, arguments.search)
    with arguments.out.open("w", encoding="utf-8") if arguments.out else nullcontext() as out:
        return asyncio.run(_rewrite_all(requests, arguments, source, config, out))


def read_requests(arguments: argparse.Namespace) -> Iterable[Request]:
    """The requests of the command line, of stdin and of the file.

    Raises:
        LaunchError: a line of JSON is none, or lacks its request.
    """
    for text in arguments.requests:
        if text == "-":
            yield from _read_lines(sys.stdin, "stdin", arguments.database)
        else:
            yield Request(text, arguments.database)
    if arguments.file is not None:
        with arguments.file.open(encoding="utf-8") as lines:
            yield from _read_lines(lines, str(arguments.file), arguments.database)


def _read_lines(lines: Iterable[str], source: str, database: str) -> Iterable[Request]:
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if text.startswith("{"):
            yield _from_json(text, f"{source}, line {number}", database)
        elif text:
            yield Request(text, database)


def _from_json(line: str, place: str, database: str) -> Request:
    try:
        fields = json.loads(line)
        text = fields.get("request") or fields["text"]
        given = {name: fields[name] for name in ("database", "knowledge", "max_date") if fields.get(name)}
    except (ValueError, LookupError):
        raise LaunchError(f"{place}: not a JSON object with the key request") from None
    if not all(isinstance(value, str) for value in (text, *given.values())):
        raise LaunchError(f"{place}: request, database, knowledge and max_date are strings")
    return Request(text, **{"database": database, **given})


async def _rewrite_all(
    requests: Sequence[Request], arguments: argparse.Namespace, source: ModelSource, config: Config, out: TextIO | None
) -> int:
    from deploy.rewriting.rewriter import AsyncRewriter
    from deploy.rewriting.task_rewriter import Wish
    from deploy.terminal import progress_bar

    wish = Wish(
        temperature=arguments.temperature,
        max_tokens=arguments.max_tokens or config.sampling.max_tokens,
        guided=not arguments.free,
        seed=config.run.seed if arguments.temperature > 0 else None,
    )
    async with AsyncRewriter(source, [config], search=arguments.search) as rewriter:
        tasks = [
            asyncio.create_task(_one(rewriter, request, wish, arguments.top if arguments.search else 0))
            for request in requests
        ]
        written = 0
        with progress_bar("Rewriting") if len(tasks) > 1 else nullcontext() as report:
            for number, task in enumerate(tasks, start=1):
                rewrite = await task
                _show(rewrite, arguments, out)
                written += not rewrite.invalid
                if report is not None:
                    report(number / len(tasks), f"{number} of {len(tasks)}")
    return 0 if written == len(tasks) else 1


async def _one(rewriter: AsyncRewriter, request: Request, wish: Wish, top: int) -> Rewrite:
    from deploy.rewriting.rewriter import NotPossible

    try:
        row = rewriter.row(
            request.text, database=request.database, knowledge=request.knowledge, max_date=request.max_date
        )
        (rewrite,) = await rewriter.attempt(row, wish=wish, top=top)
    except NotPossible as error:
        raise LaunchError(str(error)) from None
    return rewrite


def _show(rewrite: Rewrite, arguments: argparse.Namespace, out: TextIO | None) -> None:
    line = rewrite.model_dump_json(exclude_defaults=True)
    if out is not None:
        print(line, file=out, flush=True)
    if arguments.json:
        print(line, flush=True)
    elif out is None:
        print("\n".join(described(rewrite)), flush=True)


def described(rewrite: Rewrite) -> Iterable[str]:
    """Lines for people: the query first, alone on its line; what else there is, after it."""
    if rewrite.invalid:
        yield f"no query for {rewrite.request!r}: {rewrite.invalid}; the model wrote: {rewrite.text!r}"
        return
    yield rewrite.query
    if rewrite.reasoning:
        yield f"  because: {rewrite.reasoning}"
    if rewrite.unavailable:
        yield f"  could not be searched: {rewrite.unavailable}"
    if rewrite.found is not None:
        yield from _found(rewrite.found)


def _found(found: Found) -> Iterable[str]:
    if found.refused:
        yield f"  refused by the engine: {found.refused}"
        return
    yield f"  {found.count} {'rows' if found.columns else 'results'}"
    for rank, hit in enumerate(found.hits, start=1):
        yield "  " + "  ".join(part for part in (f"{rank:>3}", hit.id, hit.title, hit.url) if part)
    if found.columns:
        yield "  " + " | ".join(found.columns)
        yield from ("  " + " | ".join("NULL" if cell is None else str(cell) for cell in row) for row in found.rows)
