"""The faults of the local PubMed: what they look like on the wire, and that none ever becomes a score."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from common.scores import InvalidOutput, Score, Scored, Unavailable
from common.tasks import Row
from common.tasks.publication_search import PublicationSearch
from rewarders.engines.base import EngineMisconfigured, EngineUnavailable, SearchRequest
from rewarders.engines.pubmed import PubMedEngine, PubMedSettings
from rewarders.retry import Retrier, RetryPolicy
from rewarders.servers.pubmed import Index, RunningServer, SearchServerError, ServerSettings, serve
from rewarders.servers.pubmed.faults import BACKEND_FAILURES, Fault, FaultKind, Faults
from tests.rewarders.search_scorer import search_scorer

DATA = os.environ.get("DEEPRETRIEVAL_DATA")
TIMEOUT_S = 1.0
PATIENT_S = 30.0
VARIANTS = [(kind, detail) for kind in (FaultKind.BACKEND, FaultKind.TRUNCATED) for detail in (0.0, 0.999)]
QUICK = [kind for kind in FaultKind if kind is not FaultKind.LATE]  # without those that take a deadline each
ALMOST_ALL = 0.999999  # a rate below 1 that the tests' few draws never miss


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("faulty")
    rows = [{"_id": str(n), "title": f"Heart study {n}", "text": f"aspirin word{n}"} for n in range(20)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Index.of_corpus(folder, folder / "cache")


@asynccontextmanager
async def faulty(
    index: Index, timeout_s: float = TIMEOUT_S, **changes: Any
) -> AsyncIterator[tuple[RunningServer, PubMedEngine]]:
    settings = ServerSettings(corpus=Path("unused"), **{"fault_late_s": 30.0, **changes})
    async with await serve(settings, index) as server:
        client = PubMedSettings(base_url=server.base_url, api_key_env=None, timeout_s=timeout_s)
        async with PubMedEngine(client) as engine:
            yield server, engine


def always(monkeypatch: pytest.MonkeyPatch, *faults: Fault | None) -> None:
    """The server's fates from now on: the ones given, then the last of them for ever."""
    fates = list(faults)
    monkeypatch.setattr(Faults, "draw", lambda _: fates.pop(0) if len(fates) > 1 else fates[0])


@pytest.mark.parametrize(("kind", "detail"), [*((kind, 0.5) for kind in FaultKind), *VARIANTS])
async def test_every_kind_is_an_outage_that_costs_one_request(
    index: Index, monkeypatch: pytest.MonkeyPatch, kind: FaultKind, detail: float
) -> None:
    always(monkeypatch, Fault(kind, detail))
    async with faulty(index) as (_, engine):
        with pytest.raises(EngineUnavailable) as caught:
            await engine.search(SearchRequest("heart", retmax=50))
        assert not isinstance(caught.value, EngineMisconfigured), "such an outage would not be retried"
        assert engine.requests_sent == 1, "no canary is needed to see it"


@pytest.mark.parametrize("kind", list(FaultKind))
async def test_every_kind_is_tried_again(index: Index, monkeypatch: pytest.MonkeyPatch, kind: FaultKind) -> None:
    always(monkeypatch, Fault(kind, 0.5), None)
    async with faulty(index) as (_, engine):
        retrier = Retrier(RetryPolicy(attempts=2), sleep=_no_wait)
        found = await retrier.run(lambda: engine.search(SearchRequest("word3", retmax=50)))
    assert (found.ids, retrier.retries) == (("3",), 1)


@pytest.mark.parametrize("kind", QUICK)
async def test_a_wrong_query_stays_wrong_and_a_good_one_good(
    index: Index, monkeypatch: pytest.MonkeyPatch, kind: FaultKind
) -> None:
    """A refusal is settled by a canary and a second try; each of the three requests may meet a fault."""
    wrong = _text("((heart")
    for place in range(3):
        always(monkeypatch, *[None] * place, Fault(kind, 0.5), None)
        async with faulty(index) as (_, engine):
            scorer = search_scorer(PublicationSearch(top_k=50), engine, retrier=Retrier(RetryPolicy(attempts=1)))
            assert isinstance(await scorer.score_text(wrong, _ROW), Unavailable)
            settled = await scorer.score_text(wrong, _ROW)
            assert isinstance(settled, InvalidOutput)
            assert settled.reason == "refused_query"


async def test_with_faults_a_score_is_the_true_one_or_none(index: Index) -> None:
    """The property behind the whole server: whatever fails in whatever order, no number is invented."""
    texts = [_text(query) for query in _queries(random.Random(0), 150)]
    async with faulty(index, PATIENT_S) as (_, engine):
        truth = await _scores(engine, texts, attempts=1)
    assert not any(isinstance(score, Unavailable) for score in truth)
    assert len({score.reward for score in truth if not isinstance(score, Unavailable)}) >= 4
    outages = 0
    for seed in range(3):
        async with faulty(index, fault_rate=0.35, fault_seed=seed) as (_, engine):
            scores = await _scores(engine, texts, attempts=2)
        outages += sum(isinstance(score, Unavailable) for score in scores)
        known = [(mine, true) for mine, true in zip(scores, truth, strict=True) if not isinstance(mine, Unavailable)]
        assert [mine for mine, _ in known] == [true for _, true in known]
        assert len(known) > len(texts) / 2
    assert outages > 0, "the retries hid every fault: the test shows nothing"


async def test_the_wire_holds_what_ncbi_was_seen_to_send(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[FaultKind, tuple[int, str, str]] = {}
    for kind in set(QUICK) - {FaultKind.CLOSED}:
        always(monkeypatch, Fault(kind, 0.5))
        seen[kind] = await _post(index)
    for name, code in (("SERVER_ERROR", 500), ("BAD_GATEWAY", 502), ("MAINTENANCE", 503), ("HTML_200", 200)):
        assert seen[FaultKind[name]][:2] == (code, "text/html")
    limited = {"error": "API rate limit exceeded", "api-key": "127.0.0.1", "count": "11", "limit": "10"}
    assert seen[FaultKind.RATE_LIMIT][0] == 429
    assert seen[FaultKind.RATE_LIMIT_200][0] == 200
    assert [json.loads(seen[kind][2]) for kind in (FaultKind.RATE_LIMIT, FaultKind.RATE_LIMIT_200)] == [limited] * 2
    status, _, body = seen[FaultKind.BACKEND]
    assert status == 200
    assert json.loads(body)["esearchresult"] == {"ERROR": BACKEND_FAILURES[1]}
    status, _, body = seen[FaultKind.TRUNCATED]
    always(monkeypatch, None)
    whole = (await _post(index))[2]
    assert status == 200
    assert 0 < len(body) < len(whole.rstrip())
    assert whole.startswith(body)


@pytest.mark.skipif(DATA is None, reason="needs DEEPRETRIEVAL_DATA")
async def test_the_500_page_is_the_recorded_one(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = json.loads((Path(str(DATA)) / "fixtures_errors" / "error_bodies.json").read_text())
    (recorded,) = [entry["body"] for entry in entries if entry["http_status"] == 500]
    always(monkeypatch, Fault(FaultKind.SERVER_ERROR, 0.0))
    _, _, page = await _post(index)
    parts = [part.strip() for part in recorded.split("...") if part.strip()]  # the record leaves out what it dots
    assert len(parts) == 2
    assert [part for part in parts if part not in page] == []


async def test_a_late_answer_is_a_good_one(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch, Fault(FaultKind.LATE, 0.0))
    async with faulty(index, fault_late_s=0.2) as (_, engine):
        began = asyncio.get_running_loop().time()
        assert (await engine.search(SearchRequest("word3", retmax=5))).ids == ("3",)
        assert asyncio.get_running_loop().time() - began >= 0.2


async def test_health_counts_the_faults(index: Index) -> None:
    async with faulty(index, fault_rate=ALMOST_ALL, fault_late_s=0.0) as (server, engine):
        for _ in range(30):
            try:
                await engine.search(SearchRequest("heart", retmax=5))
            except EngineUnavailable:
                continue
        async with aiohttp.ClientSession() as session, session.get(f"{server.base_url}/health") as response:
            health = await response.json()
    assert health["requests"] == sum(health["faults"].values()) == 30
    assert len(health["faults"]) >= 6


def test_the_sequence_is_the_seeds_and_the_share_is_the_rate() -> None:
    drawn = [Faults(0.1, seed, 1.0) for seed in (1, 1, 2)]
    sequences = [[faults.draw() for _ in range(20_000)] for faults in drawn]
    assert sequences[0] == sequences[1]
    assert sequences[0] != sequences[2]
    failed = Counter(fault.kind for fault in sequences[0] if fault is not None)
    assert abs(failed.total() / 20_000 - 0.1) < 0.01
    assert min(failed[kind] for kind in FaultKind) > 0.5 * failed.total() / len(FaultKind)
    assert drawn[0].counts == {kind.value: count for kind, count in failed.items()}


def test_without_a_rate_nothing_fails() -> None:
    faults = Faults(0.0, 0, 1.0)
    assert {faults.draw() for _ in range(1000)} == {None}


@pytest.mark.parametrize("changes", [{"fault_rate": 1.0}, {"fault_rate": -0.1}, {"fault_late_s": -1.0}])
def test_impossible_settings_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(SearchServerError, match=r"fault rate|negative"):
        ServerSettings(corpus=Path("unused"), **changes)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- helpers

_ROW = Row("q1", "does aspirin help", ("1", "2", "3", "4"))


async def _no_wait(_: float) -> None:
    await asyncio.sleep(0)


def _text(query: str) -> str:
    return f'<think>hm</think><answer>{{"query": "{query}"}}</answer>'


def _queries(rng: random.Random, count: int) -> list[str]:
    """Queries of every fate: full and partial recall, nothing found, refused."""
    words = [f"word{number}" for number in range(1, 9)]
    made = [" OR ".join(rng.sample(words, rng.randint(1, 6))) for _ in range(count)]
    return [f"(({query}" if rng.random() < 0.1 else query for query in made]


async def _scores(engine: PubMedEngine, texts: list[str], attempts: int) -> list[Score]:
    policy = RetryPolicy(attempts=attempts, budget_burst=1000.0)
    scorer = search_scorer(PublicationSearch(top_k=50), engine, retrier=Retrier(policy, sleep=_no_wait))
    scores = await scorer.score_group(texts, _ROW)
    assert all(isinstance(score, Scored | InvalidOutput | Unavailable) for score in scores)
    return scores


async def _post(index: Index) -> tuple[int, str, str]:
    form = {"db": "pubmed", "retmode": "json", "term": "heart", "retmax": "50"}
    async with (
        faulty(index) as (server, _),
        aiohttp.ClientSession() as session,
        session.post(server.esearch_url, data=form) as response,
    ):
        return response.status, response.content_type, await response.text()
