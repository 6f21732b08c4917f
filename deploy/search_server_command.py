"""`deepretrieval search-server KIND`: a local search engine over a corpus, until a signal ends it."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from common.config import Config
from common.config.schema import Bm25Config, DenseConfig
from common.config.section import Section

logger = logging.getLogger(__name__)

KINDS = ("pubmed", "ctgov", "bm25", "dense")
SECTIONS: Final[dict[str, type[Section]]] = {"bm25": Bm25Config, "dense": DenseConfig}


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add the command; returns its parser."""
    server = commands.add_parser(
        "search-server", help="a search server over a local corpus: like PubMed or ClinicalTrials.gov, BM25, or dense"
    )
    server.add_argument("kind", choices=KINDS)
    server.add_argument("--corpus", type=Path, required=True, help="BEIR folder (ctgov: or study records)")
    server.add_argument("--host", default="127.0.0.1")
    server.add_argument("--port", type=int, default=8900, help="0 takes a free one")
    server.add_argument("--latency-ms", type=float, default=0.0, help="latency of every answer")
    server.add_argument("--jitter-ms", type=float, default=0.0, help="random latency on top")
    server.add_argument("--quota", type=int, help="requests allowed per window; others get status 429")
    server.add_argument("--window", type=float, default=1.0, help="window of the quota in seconds")
    server.add_argument("--fault-rate", type=float, default=0.0, help="share of requests that fail as they do there")
    server.add_argument("--fault-seed", type=int, default=0, help="seed of the sequence of faults")
    server.add_argument("--data-timestamp", help="ctgov: what /version says; default: made from the records")
    for name, section in SECTIONS.items():
        add_section(server, server.add_argument_group(f"{name} (search.{name} of a config)"), section)
    server.set_defaults(handler=run)
    return server


def add_section(server: argparse.ArgumentParser, group: argparse._ArgumentGroup, section: type[Section]) -> None:
    """An option for every key of a section, None where it is not given."""
    there = {option for action in server._actions for option in action.option_strings}
    for name, field in section.model_fields.items():
        option = f"--{name.replace('_', '-')}"
        if option in there:  # both have `threads`
            continue
        if field.annotation in (bool, bool | None):
            group.add_argument(option, action=argparse.BooleanOptionalAction, help=field.description)
        else:
            group.add_argument(option, type=_reader(field), metavar=name.upper(), help=field.description)


def _reader(field: FieldInfo) -> Callable[[str], Any]:
    """Reads a value as a config does, bounds included."""
    annotated: Any = Annotated[field.annotation, field]
    adapter: TypeAdapter[Any] = TypeAdapter(annotated)

    def read(text: str) -> Any:
        try:
            return adapter.validate_python(text)
        except ValidationError as error:
            raise argparse.ArgumentTypeError(error.errors()[0]["msg"]) from None

    return read


def section_of(arguments: argparse.Namespace) -> Section:
    """The section of the engine that the options describe."""
    kind = SECTIONS[arguments.kind]
    given = {name: getattr(arguments, name) for name in kind.model_fields}
    return kind(**{name: value for name, value in given.items() if value is not None})


def options_of(config: Config) -> tuple[str, ...]:
    """The words of the command that start the server a config describes, without address."""
    search = config.search
    words: dict[str, object] = {
        "--corpus": config.data.corpus,
        "--latency-ms": search.latency_ms,
        "--fault-rate": search.fault_rate,
        "--fault-seed": config.run.seed,
    }
    if search.quota is not None:
        words |= {"--quota": search.quota.requests, "--window": search.quota.window_s}
    if search.engine in SECTIONS:
        for name, value in getattr(search, search.engine).model_dump().items():
            option = name.replace("_", "-")
            if isinstance(value, bool):
                words[f"--{option}" if value else f"--no-{option}"] = None
            elif value is not None:
                words[f"--{option}"] = value
    # One word each: the value of an option may begin with a dash.
    return (search.engine, *(name if value is None else f"{name}={value}" for name, value in words.items()))


def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM."""
    from deploy.assets import cache_folder

    common: dict[str, Any] = {
        "corpus": arguments.corpus,
        "host": arguments.host,
        "port": arguments.port,
        "cache_folder": cache_folder() / "indexes",
        "latency_ms": arguments.latency_ms,
        "jitter_ms": arguments.jitter_ms,
        "quota": arguments.quota,
        "window_s": arguments.window,
        "fault_rate": arguments.fault_rate,
        "fault_seed": arguments.fault_seed,
    }
    match arguments.kind:
        case "pubmed":
            from rewarders.servers import pubmed

            pubmed.run(pubmed.ServerSettings(**common))
        case "ctgov":
            from rewarders.servers import ctgov

            ctgov.run(ctgov.ServerSettings(**common, data_timestamp=arguments.data_timestamp))
        case _:
            _run_retrieval(arguments, common)
    return 0


def _run_retrieval(arguments: argparse.Namespace, common: dict[str, Any]) -> None:
    from deploy.index_building import make_backend
    from rewarders.servers.retrieval.app import run as serve
    from rewarders.servers.retrieval.backend import Backend
    from rewarders.servers.traffic import ServerSettings

    progress = _Progress()

    def make(corpus: Path, cache: Path | None) -> Backend:
        return make_backend(arguments.kind, section_of(arguments), corpus, cache, progress)

    serve(ServerSettings(**common), make, progress)


class _Progress:
    """Says every tenth part of what an index takes to build."""

    def __init__(self) -> None:
        self._said = 0

    def __call__(self, done: int, total: int) -> None:
        tenth = 10 * done // max(total, 1)
        if tenth < self._said:  # the next stage
            self._said = 0
        if tenth > self._said:
            self._said = tenth
            logger.info("building the index: %d of %d documents", done, total)
