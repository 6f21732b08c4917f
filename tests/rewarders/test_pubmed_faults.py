"""The faults of the local PubMed: what they look like on the wire, and that none ever becomes a score."""

from __future__ import annotations

import asyncio
import json
import os
import random
from pathlib import Path

import aiohttp
import pytest

from common.scores import InvalidOutput, Score, Scored, Unavailable
from common.tasks import Row
from common.tasks.publication_search import PublicationSearch
from rewarders.engines.http import HttpEngine
from rewarders.retry import Retrier, RetryPolicy
from rewarders.servers.faults import Fault
from rewarders.servers.pubmed import Index
from rewarders.servers.pubmed.faults import BACKEND_FAILURES, FaultKind
from tests.rewarders.faulty_service import DOCUMENTS, PUBMED
from tests.rewarders.search_scorer import search_scorer

DATA = os.environ.get("DEEPRETRIEVAL_DATA")
PATIENT_S = 30.0
QUICK = PUBMED.quick


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    index: Index = PUBMED.build(tmp_path_factory.mktemp("faulty"))
    return index


@pytest.mark.parametrize("kind", QUICK)
async def test_a_wrong_query_stays_wrong_and_a_good_one_good(
    index: Index, monkeypatch: pytest.MonkeyPatch, kind: FaultKind
) -> None:
    """A refusal is settled by a canary and a second try; each of the three requests may meet a fault."""
    wrong = _text("((heart")
    for place in range(3):
        PUBMED.always(monkeypatch, *[None] * place, Fault(kind, 0.5), None)
        async with PUBMED.running(index) as (_, engine):
            scorer = search_scorer(PublicationSearch(top_k=50), engine, retrier=Retrier(RetryPolicy(attempts=1)))
            assert isinstance(await scorer.score_text(wrong, _ROW), Unavailable)
            settled = await scorer.score_text(wrong, _ROW)
            assert isinstance(settled, InvalidOutput)
            assert settled.reason == "refused_query"


async def test_with_faults_a_score_is_the_true_one_or_none(index: Index) -> None:
    """The property behind the whole server: whatever fails in whatever order, no number is invented."""
    texts = [_text(query) for query in _queries(random.Random(0), 150)]
    async with PUBMED.running(index, timeout_s=PATIENT_S) as (_, engine):
        truth = await _scores(engine, texts, attempts=1)
    assert not any(isinstance(score, Unavailable) for score in truth)
    assert len({score.reward for score in truth if not isinstance(score, Unavailable)}) >= 4
    outages = 0
    for seed in range(3):
        async with PUBMED.running(index, fault_rate=0.35, fault_seed=seed) as (_, engine):
            scores = await _scores(engine, texts, attempts=2)
        outages += sum(isinstance(score, Unavailable) for score in scores)
        known = [(mine, true) for mine, true in zip(scores, truth, strict=True) if not isinstance(mine, Unavailable)]
        assert [mine for mine, _ in known] == [true for _, true in known]
        assert len(known) > len(texts) / 2
    assert outages > 0, "the retries hid every fault: the test shows nothing"


async def test_the_wire_holds_what_ncbi_was_seen_to_send(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[FaultKind, tuple[int, str, str]] = {}
    for kind in set(QUICK) - {FaultKind.CLOSED, FaultKind.RESET}:
        PUBMED.always(monkeypatch, Fault(kind, 0.5))
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
    PUBMED.always(monkeypatch, None)
    whole = (await _post(index))[2]
    assert status == 200
    assert json.loads(seen[FaultKind.EMPTY][2])["esearchresult"]["idlist"] == []
    assert int(json.loads(seen[FaultKind.EMPTY][2])["esearchresult"]["count"]) == DOCUMENTS
    assert 0 < len(body) < len(whole.rstrip())
    assert whole.startswith(body)


@pytest.mark.skipif(DATA is None, reason="needs DEEPRETRIEVAL_DATA")
async def test_the_500_page_is_the_recorded_one(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = json.loads((Path(str(DATA)) / "fixtures_errors" / "error_bodies.json").read_text())
    (recorded,) = [entry["body"] for entry in entries if entry["http_status"] == 500]
    PUBMED.always(monkeypatch, Fault(FaultKind.SERVER_ERROR, 0.0))
    _, _, page = await _post(index)
    parts = [part.strip() for part in recorded.split("...") if part.strip()]  # the record leaves out what it dots
    assert len(parts) == 2
    assert [part for part in parts if part not in page] == []


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


async def _scores(engine: HttpEngine, texts: list[str], attempts: int) -> list[Score]:
    policy = RetryPolicy(attempts=attempts, budget_burst=1000.0)
    scorer = search_scorer(PublicationSearch(top_k=50), engine, retrier=Retrier(policy, sleep=_no_wait))
    scores = await scorer.score_group(texts, _ROW)
    assert all(isinstance(score, Scored | InvalidOutput | Unavailable) for score in scores)
    return scores


async def _post(index: Index) -> tuple[int, str, str]:
    form = {"db": "pubmed", "retmode": "json", "term": "heart", "retmax": "50"}
    async with (
        PUBMED.running(index) as (server, _),
        aiohttp.ClientSession() as session,
        session.post(server.esearch_url, data=form) as response,
    ):
        return response.status, response.content_type, await response.text()
