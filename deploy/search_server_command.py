"""`deepretrieval search-server KIND`: a local search engine over a corpus, until a signal ends it."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from common.config import Config
from common.config.schema import Bm25Config, DenseConfig

logger = logging.getLogger(__name__)

KINDS = ("pubmed", "ctgov", "bm25", "dense")
_BM25, _DENSE = Bm25Config(), DenseConfig()


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
    server.add_argument("--threads", type=int, default=1, help="bm25: per process; dense: of encoder and index")
    _add_bm25(server.add_argument_group("bm25"))
    _add_dense(server.add_argument_group("dense"))
    server.set_defaults(handler=run)
    return server


def _add_bm25(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--k1", type=float, default=_BM25.k1, help="saturation of term frequency")
    group.add_argument("--b", type=float, default=_BM25.b, help="length normalisation")
    group.add_argument("--syntax", choices=["words", "boolean"], default=_BM25.syntax, help="query language")
    group.add_argument("--processes", type=int, default=_BM25.processes, help="JVMs")


def _add_dense(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--encoder", default=_DENSE.encoder, help="folder or hub id; default: made from the corpus")
    group.add_argument("--pooling", choices=["mean", "cls", "last"], default=_DENSE.pooling)
    group.add_argument("--query-prefix", default=_DENSE.query_prefix, help="put before every query")
    group.add_argument("--passage-prefix", default=_DENSE.passage_prefix, help="put before every passage")
    group.add_argument(
        "--normalize", action=argparse.BooleanOptionalAction, default=_DENSE.normalize, help="unit vectors (cosine)"
    )
    group.add_argument("--max-tokens", type=int, default=_DENSE.max_tokens, help="longer texts are cut")
    group.add_argument("--index", choices=["flat", "hnsw"], default=_DENSE.index, help="exact or approximate")
    group.add_argument("--hnsw-m", type=int, default=_DENSE.hnsw_m, help="links per vector")
    group.add_argument("--hnsw-ef-construction", type=int, default=_DENSE.hnsw_ef_construction, help="candidates")
    group.add_argument("--hnsw-ef-search", type=int, default=_DENSE.hnsw_ef_search, help="candidates looked at")
    group.add_argument(
        "--gpu", action=argparse.BooleanOptionalAction, default=_DENSE.gpu, help="search on the GPU (faiss-gpu)"
    )
    group.add_argument("--batch", type=int, default=_DENSE.batch, help="most queries encoded at once")


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
    if search.engine in ("bm25", "dense"):
        section = search.bm25 if search.engine == "bm25" else search.dense
        for name, value in section.model_dump().items():
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
    from rewarders.servers.retrieval.app import run as serve
    from rewarders.servers.retrieval.backend import Backend
    from rewarders.servers.traffic import ServerSettings

    progress = _Progress()

    def make(corpus: Path, cache: Path | None) -> Backend:
        if arguments.kind == "bm25":
            from rewarders.servers.retrieval.lucene import LuceneBackend, LuceneSettings

            names = Bm25Config.model_fields
            return LuceneBackend(corpus, LuceneSettings(**{n: getattr(arguments, n) for n in names}), cache, progress)
        from rewarders.servers.retrieval.dense import DenseBackend, DenseSettings

        names = DenseConfig.model_fields
        return DenseBackend(corpus, DenseSettings(**{n: getattr(arguments, n) for n in names}), cache, progress)

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
