"""Do scores survive a search service that fails all the time?

For `--minutes`, groups of 8 samples go through a real broker and real rewarder processes to a local PubMed and, beside
it, a local ClinicalTrials.gov. Each fails `--rate` of its requests in all the ways it knows (429, 500, 502, 503, a
hang, a closed and a reset connection, HTML, JSON cut short, an error under status 200, an answer without its ids), and
for `--outage` seconds every request. Groups that could not be scored go back to the broker and are tried again. After
the time, what is under way is waited for.

The same texts are scored in this process by a server without faults. Queries are all different, so no cache hides a
fault; `--refused` of them are refused by the engine, one in twenty texts is malformed. Prints one JSON line, sums over
both services, which are listed under `services`:

* `minutes`, `answers`: requests the servers got; `faults`: those that failed; `outage_s`: length of the outage;
* `scored`: samples whose scores reached the learner; `released`: times that a group went back to the broker;
* `lost`: samples sent without a score in the end; `invented`: samples whose reward is not the one without faults, or
  that were scored though nobody asked; `different`: samples whose score differs in anything from the one without
  faults.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from common.data.demo_world import build_demo_world

from benchmarks.rewarder_fleet import RewarderFleet
from benchmarks.search_process import Kind, SearchProcess
from common.data.rows import read_requests
from common.scores import InvalidOutput, Score, Scored
from common.tasks import Row
from common.tasks.from_config import task_of
from deploy.engines import answerer_of
from rewarders.scoring import Scorer
from rewarders.servers.traffic import ServerSettings

GROUP = 8
TIMEOUT_S = 2.0  # of a request: a hang costs so much
DRAIN_S = 600.0  # a service may ask to be left alone for a minute, again and again
MALFORMED_SHARE = 0.05
TASK: dict[Kind, str] = {"pubmed": "publication_search", "ctgov": "trial_search"}
SORT: dict[Kind, str] = {"pubmed": "pub_date", "ctgov": "relevance"}


@dataclass
class Tally:
    """What became of the samples of one service."""

    answers: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    sent: int = 0
    scored: int = 0
    released: int = 0
    invented: int = 0
    different: int = 0
    refused: int = 0

    def add(self, scores: Sequence[Score], truth: Sequence[Score]) -> None:
        """Count a group that was sent: the scores that came, if any did, beside those without faults."""
        self.sent += len(truth)
        self.scored += len(scores)
        for mine, true in zip(scores, truth, strict=bool(scores)):
            assert isinstance(true, Scored | InvalidOutput), f"the server without faults failed: {true}"
            self.invented += getattr(mine, "reward", None) != true.reward
            self.different += mine != true
            self.refused += isinstance(true, InvalidOutput) and true.reason == "refused_query"

    def report(self) -> dict[str, Any]:
        """Its part of the JSON line."""
        counts = {name: getattr(self, name) for name in ("answers", "scored", "released", "refused")}
        verdicts = {"lost": self.sent - self.scored, "invented": self.invented, "different": self.different}
        return {**counts, **verdicts, "faults": sum(self.faults.values()), "faults_by_kind": self.faults}


class Texts:
    """Groups of texts, the same ones for the same seed; no two queries are equal."""

    def __init__(self, rows: Sequence[Row], refused_share: float, seed: int) -> None:
        self._rows = rows
        self._refused_share = refused_share
        self._random = random.Random(seed)

    def group(self, number: int) -> tuple[Row, list[str]]:
        """A request and its samples."""
        row = self._rows[number % len(self._rows)]
        words = [word for word in row.text.replace(",", " ").replace(".", " ").split() if word.isalpha()]
        return row, [self._text(words, f"nothing{number}x{sample}") for sample in range(GROUP)]

    def _text(self, words: list[str], unique: str) -> str:
        first, second = self._random.choices(words, k=2)
        operator = self._random.choice(["AND", "OR"])
        query = f"({first} {operator} {second}) OR {unique}"
        fate = self._random.random()
        if fate < self._refused_share:
            query = f"(({query}"
        closing = "" if fate > 1 - MALFORMED_SHARE else "</answer>"
        return f'<answer>{{"query": "{query}"}}{closing}'


class Soak:
    """One service under faults, with its fleet, and a second server without faults that knows the truth."""

    def __init__(self, kind: Kind, folder: Path, corpus: Path, arguments: argparse.Namespace) -> None:
        self._kind = kind
        self._folder = folder
        self._corpus = corpus
        self._arguments = arguments
        self._sent: dict[int, tuple[Row, list[str]]] = {}
        self._scores: dict[int, Sequence[Score]] = {}
        self.tally = Tally()

    async def run(self) -> Tally:
        """Soak, drain, compare."""
        options = self._arguments
        common = ServerSettings(corpus=self._corpus, cache_folder=self._folder / "index")
        outage_at_s = 60 * options.minutes / 4
        faulty = ServerSettings(
            corpus=self._corpus,
            cache_folder=self._folder / "index",
            fault_rate=options.rate,
            fault_seed=options.seed,
            fault_late_s=2 * TIMEOUT_S,
            outage_at_s=outage_at_s,
            outage_s=options.outage,
            retry_after_s=options.retry_after,
        )
        with SearchProcess(self._kind, common) as honest, SearchProcess(self._kind, faulty) as failing:
            async with RewarderFleet(self._folder / "run", self._settings(failing.base_url)) as fleet:
                for number in range(options.rewarders):
                    fleet.start_rewarder(f"rewarder-{number}")
                await self._soak(fleet, failing.base_url)
                config = fleet.config
            search = config.search.model_copy(update={"url": honest.base_url, "timeout_s": 60.0})
            await self._compare(config.model_copy(update={"search": search}))
        return self.tally

    def _settings(self, url: str) -> list[str]:
        search = {"engine": self._kind, "url": url, "retmax": 50, "sort": SORT[self._kind], "timeout_s": TIMEOUT_S}
        return [
            f"task.name={TASK[self._kind]}",
            "task.reasoning=false",
            *(f"search.{name}={value}" for name, value in search.items()),
            *self._arguments.overrides,
        ]

    async def _soak(self, fleet: RewarderFleet, url: str) -> None:
        rows = read_requests(self._corpus, "train")
        texts = Texts(rows, self._arguments.refused, self._arguments.seed)
        began = time.monotonic()
        ends = began + 60 * self._arguments.minutes
        receiving = asyncio.create_task(self._receive(fleet))
        try:
            while time.monotonic() < ends:
                if len(self._sent) - len(self._scores) < self._arguments.window:
                    number = len(self._sent)
                    self._sent[number] = texts.group(number)
                    fleet.send(number, *self._sent[number])
                await asyncio.sleep(1 / self._arguments.groups_per_s)
                self._say(f"{len(self._sent)} groups sent, {len(self._scores)} scored", every_s=15.0)
            while len(self._scores) < len(self._sent) and time.monotonic() < ends + DRAIN_S:
                self._say(f"waiting for {len(self._sent) - len(self._scores)} groups", every_s=15.0)
                await asyncio.sleep(0.2)
            await asyncio.sleep(1.0)  # what nobody asked for could still come
        finally:
            receiving.cancel()
            await asyncio.gather(receiving, return_exceptions=True)
        await self._ask_the_fleet(fleet, url)

    async def _receive(self, fleet: RewarderFleet) -> None:
        while True:
            result = await fleet.receive()
            if result.ticket in self._scores or result.ticket not in self._sent:
                self.tally.invented += len(result.scores)
            self._scores[result.ticket] = result.scores

    async def _ask_the_fleet(self, fleet: RewarderFleet, url: str) -> None:
        peers = (await fleet.learner.fleet_status()).peers
        self.tally.released = sum(int(peer.status.counters.get("unavailable", 0)) for peer in peers)
        async with aiohttp.ClientSession() as session, session.get(f"{url}/health") as response:
            health = await response.json()
        self.tally.answers, self.tally.faults = health["requests"], health["faults"]

    async def _compare(self, config: Any) -> None:
        """Score everything again without faults, and look for differences."""
        task = task_of(config)
        async with answerer_of(config, task) as answerer:
            scorer = Scorer(task, answerer)
            for number, (row, texts) in self._sent.items():
                truth = await scorer.score_group(texts, row)
                self.tally.add(self._scores.get(number, ()), truth)

    def _say(self, text: str, every_s: float) -> None:
        now = time.monotonic()
        if now - getattr(self, "_said_at", 0.0) > every_s:
            self._said_at = now
            print(f"{self._kind}: {text}", file=sys.stderr, flush=True)


def trials_of(corpus: Path, folder: Path) -> Path:
    """The same world under the ids of trials."""
    shutil.copytree(corpus, folder)
    numbers: dict[str, str] = {}
    lines = []
    for line in (corpus / "corpus.jsonl").read_text().splitlines():
        document = json.loads(line)
        numbers[document["_id"]] = document["_id"] = f"NCT{len(numbers) + 1:08d}"
        lines.append(json.dumps(document))
    (folder / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    for path in (folder / "qrels").glob("*.tsv"):
        head, *judgments = path.read_text().splitlines()
        fields = [judgment.split("\t") for judgment in judgments]
        path.write_text("\n".join([head, *("\t".join([q, numbers[d], *rest]) for q, d, *rest in fields)]) + "\n")
    return folder


async def soak(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """All services at once; the JSON line."""
    requests = arguments.documents // 5
    world = build_demo_world(
        folder / "world",
        documents=arguments.documents,
        train_requests=requests - requests // 5,
        test_requests=requests // 5,
    )
    corpora: dict[Kind, Path] = {"pubmed": world, "ctgov": trials_of(world, folder / "trials")}
    soaks = {kind: Soak(kind, folder / kind, corpora[kind], arguments) for kind in arguments.services}
    for kind in soaks:
        (folder / kind).mkdir()
    async with asyncio.TaskGroup() as running:
        for each in soaks.values():
            running.create_task(each.run())
    reports = {kind: each.tally.report() for kind, each in soaks.items()}
    names = ("answers", "faults", "scored", "released", "lost", "invented", "different")
    sums = {name: sum(report[name] for report in reports.values()) for name in names}
    return {"minutes": arguments.minutes, "outage_s": arguments.outage, **sums, "services": reports}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--minutes", type=float, default=5.0)
    made.add_argument("--rate", type=float, default=0.3, help="share of the answers that fail")
    made.add_argument("--outage", type=float, default=60.0, help="seconds in which all fail, from a quarter on")
    made.add_argument("--refused", type=float, default=0.1, help="share of the queries that are wrong")
    made.add_argument("--retry-after", type=float, help="seconds that 403, 429 and 503 name; default: they do not")
    made.add_argument("--rewarders", type=int, default=2, help="processes per service")
    made.add_argument("--groups-per-s", type=float, default=4.0, help="groups sent per second and service, at most")
    made.add_argument("--window", type=int, default=256, help="groups under way, at most")
    made.add_argument("--documents", type=int, default=4000, help="documents of the world")
    made.add_argument("--services", nargs="+", choices=list(TASK), default=list(TASK))
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--overrides", nargs="*", default=[], help="further config overrides, as search.attempts=2")
    return made


def main() -> None:
    """Soak and print the JSON line."""
    arguments = parser().parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = asyncio.run(soak(Path(folder), arguments))
    print(json.dumps(report))
    if report["lost"] or report["invented"] or report["different"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
