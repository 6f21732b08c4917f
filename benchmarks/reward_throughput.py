"""How fast does a rewarder score, and what does it make of a quota?

All parts are against the local PubMed server in a process of its own over the demo world.

Without quota: texts with distinct queries go through scorer, answerer, cache, retries and PubMed client, groups of 8,
in one process; the same requests (same forms, same concurrency) are posted by a bare aiohttp loop that reads the
answers and looks at nothing. Both take turns. The server's CPU time is the same for both, and on a machine with few
cores it may be what bounds them, so the CPU time of this process is reported too.

With a quota: a stream of groups of 8 as a GRPO policy writes them (`benchmarks.training_stream` says where its repeats
come from; `--samples` takes those of a real run instead), 15 % of the samples malformed, 5 % of the groups no longer
wanted when their turn comes (their leases are gone). A rewarder works the stream off and the server counts what it is
asked. Two other clients are known to ask for the same stream

* one call per sample: as often as there are samples, whatever became of them;
* two calls per sample: the original DeepRetrieval, which asks for the count and then for the ids of every well-formed
  sample, repeated or not.

What they take for the whole stream is counted, not asked. But then all three really work a short stretch off, each
request under a slot of a real broker with a quota of 10 per second. Last, the beginning of the stream, without the
stale groups, goes through such a broker to a real rewarder process. Prints one JSON line:

* `scored_per_s`, `raw_per_s`: samples and bare requests per second, medians over the rounds; `ratio`: median over the
  rounds of scored / raw of the same round; `scored_cpu_us`, `raw_cpu_us`: CPU microseconds of this process for each;
* `samples_per_unit`, `one_call_per_sample`, `two_calls_per_sample`: samples scored in time per request upstream (a
  malformed sample is scored by no request); `scored`, `units`: the samples and requests of ours;
* `stream`: what repeats in the stream; `clients`: of each of the three on the stretch, the samples scored in time, the
  requests the server got, and how fast; `stretch`: what repeats in it;
* `paced`: what the real quota granted the rewarder process, and what was scored with it.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.quota_rivals import compare_clients, stretch_of
from benchmarks.quota_units import paced, work_off
from benchmarks.search_process import SearchProcess
from benchmarks.training_stream import GROUP, StreamWriter, statistics_of, text_of
from common.data.rows import read_requests
from common.data.worlds.publications import build_world
from common.tasks import Row
from common.tasks.publication_search import PublicationSearch
from rewarders.answerers.search import SearchAnswerer
from rewarders.engines.base import SearchRequest
from rewarders.engines.pubmed import PubMedEngine, PubMedSettings
from rewarders.scoring import Scorer
from rewarders.servers.traffic import ServerSettings


class QuerySource:
    """Queries that are all different: two or three words of a request, and a number that no document holds."""

    def __init__(self, rows: list[Row]) -> None:
        self._rows = rows
        self._made = 0

    def groups(self, count: int) -> list[tuple[Row, list[str]]]:
        """The next groups: a request and the queries of its samples."""
        made = []
        for _ in range(count):
            row = self._rows[self._made % len(self._rows)]
            words = [word for word in row.text.replace(",", " ").replace(".", " ").split() if word.isalpha()]
            made.append((row, [self._query(words) for _ in range(GROUP)]))
        return made

    def _query(self, words: list[str]) -> str:
        self._made += 1
        first, second = (words[(self._made * step) % len(words)] for step in (1, 3))
        return f"({first} AND {second}) OR nothing{self._made}"


async def compare(url: str, rows: list[Row], arguments: argparse.Namespace) -> dict[str, float]:
    """Both loops in turn."""
    task = PublicationSearch(top_k=arguments.top_k)
    settings = PubMedSettings(base_url=url, api_key_env=None)
    engine, esearch_url = PubMedEngine(settings), settings.esearch_url
    queries = QuerySource(rows)
    rounds = []
    async with SearchAnswerer(task, engine) as answerer, bare_session() as session:
        scorer = Scorer(task, answerer)
        for number in range(arguments.rounds + 1):
            groups = queries.groups(arguments.groups)
            texts = [(row, [text_of(query) for query in written]) for row, written in groups]
            forms = [
                engine.form(SearchRequest(query, retmax=task.top_k, max_date=row.max_date))
                for row, written in groups
                for query in written
            ]
            scored = await timed(score_all(scorer, texts, arguments.concurrency))
            raw = await timed(post_all(session, esearch_url, forms, arguments.concurrency))
            if number == 0:  # connections, caches of the server, compilation of patterns
                continue
            rounds.append((*scored, *raw))
            progress(f"round {number}: scored {scored[0]:.0f}/s, raw {raw[0]:.0f}/s, ratio {scored[0] / raw[0]:.2f}")
        assert engine.requests_sent == GROUP * arguments.groups * (arguments.rounds + 1)
    scored_per_s, scored_us, raw_per_s, raw_us = (statistics.median(column) for column in zip(*rounds, strict=True))
    return {
        "scored_per_s": round(scored_per_s, 1),
        "raw_per_s": round(raw_per_s, 1),
        "ratio": round(statistics.median(each[0] / each[2] for each in rounds), 3),
        "scored_cpu_us": round(scored_us, 1),
        "raw_cpu_us": round(raw_us, 1),
    }


async def timed(work: Awaitable[int]) -> tuple[float, float]:
    """Items per second, and CPU microseconds of this process per item."""
    gc.collect()
    began, cpu = time.perf_counter(), time.process_time()
    items = await work
    return items / (time.perf_counter() - began), 1e6 * (time.process_time() - cpu) / items


async def score_all(scorer: Scorer, groups: list[tuple[Row, list[str]]], concurrency: int) -> int:
    """Score groups of texts, `concurrency` samples at a time; the number of samples."""

    async def one(group: tuple[Row, list[str]]) -> None:
        await scorer.score_group(group[1], group[0])

    await at_a_time(concurrency // GROUP, groups, one)
    return GROUP * len(groups)


async def post_all(session: aiohttp.ClientSession, url: str, forms: list[dict[str, str]], concurrency: int) -> int:
    """Post forms, `concurrency` at a time; their number."""

    async def one(form: dict[str, str]) -> None:
        async with session.post(url, data=form) as response:
            await response.read()

    await at_a_time(concurrency, forms, one)
    return len(forms)


async def at_a_time(count: int, items: list[Any], handle: Callable[[Any], Awaitable[None]]) -> None:
    """Handle all items, `count` at a time."""
    source: Iterator[Any] = iter(items)

    async def work() -> None:
        for item in source:
            await handle(item)

    async with asyncio.TaskGroup() as workers:
        for _ in islice(items, count):
            workers.create_task(work())


def bare_session() -> aiohttp.ClientSession:
    """What a client without our engine would open."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))


def progress(text: str) -> None:
    """Tell who watches."""
    print(text, file=sys.stderr, flush=True)


async def spend(url: str, rows: list[Row], folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The part with a quota."""
    writer = StreamWriter(rows, arguments.malformed, arguments.stale, seed=0)
    source = writer.recorded(arguments.samples) if arguments.samples else writer.generated(arguments.stream_groups)
    groups = list(source)
    report: dict[str, Any] = await work_off(groups, PublicationSearch(top_k=arguments.top_k), url)
    progress(f"{report['samples_per_unit']} samples per unit")
    report["stream"] = statistics_of(groups)
    if arguments.clients_seconds > 0:
        stretch = stretch_of(rows, arguments.malformed, arguments.stale, arguments.clients_seconds)
        report["clients"] = await compare_clients(stretch, folder / "clients", url, arguments.top_k)
        report["stretch"] = statistics_of(stretch)
    if arguments.paced_seconds > 0:
        report["paced"] = await paced(groups, folder / "run", url, arguments.top_k, arguments.paced_seconds)
    return report


def main() -> None:
    """Measure and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="alternations of the two loops; 0 leaves them out")
    parser.add_argument("--groups", type=int, default=100, help="groups of 8 samples per round and loop")
    parser.add_argument("--concurrency", type=int, default=64, help="requests in flight")
    parser.add_argument("--top-k", type=int, default=50, help="ids asked for")
    parser.add_argument("--stream-groups", type=int, default=3680, help="groups of the stream with a quota")
    parser.add_argument("--samples", type=Path, help="samples.jsonl of a demo run in place of the generated stream")
    parser.add_argument("--malformed", type=float, default=0.15, help="share of the samples")
    parser.add_argument("--stale", type=float, default=0.05, help="share of the groups")
    parser.add_argument(
        "--clients-seconds", type=float, default=60.0, help="of the slowest of three; 0 leaves them out"
    )
    parser.add_argument("--paced-seconds", type=float, default=30.0, help="with the real quota; 0 leaves it out")
    arguments = parser.parse_args()
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = build_world(folder / "world")
        rows = read_requests(corpus, "train")
        with SearchProcess("pubmed", ServerSettings(corpus=corpus, cache_folder=folder)) as server:
            if arguments.rounds:
                report |= asyncio.run(compare(server.base_url, rows, arguments))
            report |= asyncio.run(spend(server.base_url, rows, folder, arguments))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
