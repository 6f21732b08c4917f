"""How fast is a search through the whole path of a rewarder, against the library's own batch call and nothing else?

The path: `RetrievalEngine` in this process, all queries in flight at once -> HTTP -> `deepretrieval search-server` ->
its process with the index, and back to ids. The library gets all queries in one call (bm25: pyserini's `batch_search`
over an index that pyserini built, in a JVM of its own; dense: transformers and faiss) and as many threads as one
process of the engine. Both take turns, in one run; the order changes from round to round. The path uses up to three
processes, the library one.

Prints one JSON line: `engine_qps`, `library_qps` (queries per second, medians over the rounds), `ratio` (median over
the rounds of engine / library of the same round), `ndcg10` of the engine on the judged queries of `--split`, and what
was asked for. `--index hnsw`, `--encoder` and `--gpu` are for dense: with `--gpu`, encoder and index of both sides
are on the GPU (faiss-gpu, flat index).

A new engine is one function in `CONTESTS`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from common.config.schema import DenseConfig
from common.data.beir import read_queries, read_split
from common.metrics.ranking import ndcg
from rewarders.engines.base import SearchRequest
from rewarders.engines.retrieval import RetrievalEngine, RetrievalSettings

Library = Callable[[list[str], int], float]
"""The library's batch call: (queries, k) -> seconds until ids and scores of all hits are there."""
Contest = Callable[[argparse.Namespace, Path], AbstractContextManager[Library]]
"""Opens the library of an engine: (arguments, scratch folder) -> what to call."""

TOGETHER = 2_000  # searches in flight; a run of training has as many


@contextmanager
def bm25(arguments: argparse.Namespace, folder: Path) -> Iterator[Library]:
    """pyserini's LuceneSearcher."""
    from benchmarks.pyserini_library import PyseriniLibrary

    with PyseriniLibrary(arguments.corpus, folder / "pyserini") as library:
        yield lambda queries, k: library.search(queries, k, threads=arguments.threads, hits=False)[0]


@contextmanager
def dense(arguments: argparse.Namespace, folder: Path) -> Iterator[Library]:
    """transformers and faiss, with the encoder and vectors that the server made; in this process."""
    from benchmarks import dense_library
    from rewarders.servers.retrieval.dense import DenseSettings

    settings = DenseSettings(**dense_section(arguments).model_dump())
    search = dense_library.library_search(arguments.corpus, settings, folder / "indexes")
    yield lambda queries, k: len(queries) / dense_library.library_per_s(search, queries, k, settings.batch)


def dense_section(arguments: argparse.Namespace) -> DenseConfig:
    """What both sides of the dense contest are to be."""
    return DenseConfig(threads=arguments.threads, index=arguments.index, gpu=arguments.gpu, encoder=arguments.encoder)


CONTESTS: dict[str, Contest] = {"bm25": bm25, "dense": dense}


@contextmanager
def search_server(arguments: argparse.Namespace, folder: Path) -> Iterator[str]:
    """The base URL of `deepretrieval search-server` in a process of its own."""
    command = [sys.executable, "-m", "deploy.cli", "search-server", arguments.engine, "--port", "0"]
    command += ["--corpus", str(arguments.corpus), "--threads", str(arguments.threads)]
    if arguments.engine == "dense":
        command += [f"--index={arguments.index}", *(["--gpu"] if arguments.gpu else [])]
        command += [f"--encoder={arguments.encoder}"] if arguments.encoder else []
    environment = {**os.environ, "DEEPRETRIEVAL_CACHE": str(folder), "PYTHONUNBUFFERED": "1"}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        if "http://" not in line:
            raise RuntimeError("the search server did not start: see above")
        address = urlsplit(line[line.index("http://") :].split()[0])
        yield f"{address.scheme}://{address.netloc}"
    finally:
        server.terminate()
        server.wait()


async def engine_seconds(engine: RetrievalEngine, queries: list[str], k: int) -> float:
    """Seconds until every query has its result."""
    room = asyncio.Semaphore(TOGETHER)

    async def one(query: str) -> None:
        async with room:
            await engine.search(SearchRequest(query, k))

    started = time.perf_counter()
    await asyncio.gather(*map(one, queries))
    return time.perf_counter() - started


async def mean_ndcg(engine: RetrievalEngine, arguments: argparse.Namespace) -> float:
    """nDCG@10 over the judged queries."""
    values = []
    for row in read_split(arguments.corpus, arguments.split):
        grades = dict(zip(row.relevant, row.grades or (1.0,) * len(row.relevant), strict=True))
        result = await engine.search(SearchRequest(row.text, max(arguments.k, 10)))
        values.append(ndcg(result.ids, grades, 10))
    return statistics.mean(values)


async def compare(arguments: argparse.Namespace, url: str, library: Library) -> dict[str, object]:
    """All rounds; the first of each side warms up and does not count."""
    queries = [query.text for query in read_queries(arguments.corpus)]
    rounds: list[tuple[float, float]] = []
    async with RetrievalEngine(RetrievalSettings(url, timeout_s=300.0)) as engine:
        for number in range(arguments.rounds + 1):
            if number % 2:
                theirs = len(queries) / library(queries, arguments.k)
                ours = len(queries) / await engine_seconds(engine, queries, arguments.k)
            else:
                ours = len(queries) / await engine_seconds(engine, queries, arguments.k)
                theirs = len(queries) / library(queries, arguments.k)
            print(f"engine {ours:.0f} queries/s, library {theirs:.0f}", file=sys.stderr)
            rounds.append((ours, theirs))
        quality = await mean_ndcg(engine, arguments)
    counted = rounds[1:]
    return {
        "engine": arguments.engine,
        "engine_qps": round(statistics.median(ours for ours, _ in counted), 1),
        "library_qps": round(statistics.median(theirs for _, theirs in counted), 1),
        "ratio": round(statistics.median(ours / theirs for ours, theirs in counted), 3),
        "ndcg10": round(quality, 4),
        "k": arguments.k,
        "threads": arguments.threads,
        **({"index": arguments.index, "gpu": arguments.gpu} if arguments.engine == "dense" else {}),
        "queries": len(queries),
        "rounds": arguments.rounds,
        "cores": len(os.sched_getaffinity(0)),
    }


def main() -> None:
    """Measure and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=sorted(CONTESTS), default="bm25")
    data = os.environ.get("DEEPRETRIEVAL_DATA")
    parser.add_argument("--corpus", type=Path, default=Path(data) / "scifact" if data else None, help="BEIR folder")
    parser.add_argument("--split", default="test", help="judgments for ndcg10")
    parser.add_argument("-k", type=int, default=10, help="hits per query")
    parser.add_argument("--threads", type=int, default=1, help="of the engine's process, and of the library")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--index", choices=("flat", "hnsw"), default="flat", help="dense: exact or approximate")
    parser.add_argument("--encoder", help="dense: folder or hub id; without it one made from the corpus")
    parser.add_argument("--gpu", action="store_true", help="dense: encoder and index on a GPU")
    arguments = parser.parse_args()
    if arguments.corpus is None:
        parser.error("name a BEIR folder with --corpus, or set DEEPRETRIEVAL_DATA")
    if arguments.engine != "dense" and (arguments.gpu or arguments.encoder or arguments.index != "flat"):
        parser.error("--index, --encoder and --gpu are for --engine dense")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (
            search_server(arguments, folder) as url,
            CONTESTS[arguments.engine](arguments, folder) as library,
        ):
            figures = asyncio.run(compare(arguments, url, library))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
