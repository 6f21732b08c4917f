"""The faults of the local ClinicalTrials.gov: what they look like on the wire, and that none ever becomes a result."""

from __future__ import annotations

import asyncio
import json
import random

import aiohttp
import pytest

from rewarders.engines.base import BadQuery, EngineUnavailable, SearchRequest, SearchResult
from rewarders.engines.http import HttpEngine
from rewarders.retry import Retrier, RetryPolicy
from rewarders.servers.ctgov import Index
from rewarders.servers.ctgov.faults import FaultKind
from rewarders.servers.faults import Fault
from tests.rewarders.faulty_service import CTGOV

HEART = SearchRequest("heart", retmax=50)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    index: Index = CTGOV.build(tmp_path_factory.mktemp("faulty"))
    return index


def patient(attempts: int) -> Retrier:
    async def no_wait(_: float) -> None:
        await asyncio.sleep(0)

    return Retrier(RetryPolicy(attempts=attempts, max_wait_s=100.0, budget_burst=1000.0), sleep=no_wait)


async def test_with_faults_an_answer_is_the_true_one_or_none(index: Index) -> None:
    """Whatever fails in whatever order, no result is invented and none is cut."""
    rng = random.Random(0)
    queries = [" OR ".join(f"word{rng.randrange(20)}" for _ in range(rng.randint(1, 25))) for _ in range(60)]
    requests = [SearchRequest(f"({query}" if n % 10 == 9 else query, retmax=30) for n, query in enumerate(queries)]

    async def ask(engine: HttpEngine, request: SearchRequest, attempts: int) -> SearchResult | str:
        try:
            return await patient(attempts).run(lambda: engine.search(request))
        except BadQuery:
            return "bad"
        except EngineUnavailable:
            return "unavailable"

    async with CTGOV.running(index, timeout_s=30.0) as (_, engine):
        truth = [await ask(engine, request, 1) for request in requests]
    assert "unavailable" not in truth
    assert truth.count("bad") == 6
    outages = answered = 0
    for seed in range(3):
        async with CTGOV.running(index, fault_rate=0.2, fault_seed=seed, timeout_s=0.5) as (_, engine):
            answers = await asyncio.gather(*(ask(engine, request, 2) for request in requests))
        for answer, true in zip(answers, truth, strict=True):
            assert answer in (true, "unavailable")
            outages += answer == "unavailable"
            answered += answer == true
    assert outages > 0, "the retries hid every fault: the test shows nothing"
    assert answered > len(requests)


async def test_what_the_wire_holds(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = {"SERVER_ERROR": 500, "BAD_GATEWAY": 502, "MAINTENANCE": 503, "RATE_LIMIT": 429, "FORBIDDEN": 403}
    for name, code in {**codes, "NOT_FOUND": 404, "HTML_200": 200}.items():
        CTGOV.always(monkeypatch, Fault(FaultKind[name], 0.5))
        assert (await _get(index))[:2] == (code, "text/html")
    CTGOV.always(monkeypatch, None)
    status, _, whole = await _get(index)
    assert status == 200
    CTGOV.always(monkeypatch, Fault(FaultKind.TRUNCATED, 0.5))
    status, _, cut = await _get(index)
    assert (status, whole.startswith(cut), 0 < len(cut) < len(whole)) == (200, True, True)
    CTGOV.always(monkeypatch, Fault(FaultKind.INCOMPLETE, 0.5))
    body = json.loads((await _get(index))[2])
    assert (body["totalCount"], len(body["studies"]), "nextPageToken" in body) == (20, 5, False)


async def _get(index: Index) -> tuple[int, str, str]:
    parameters = {"query.term": "heart", "fields": "NCTId", "countTotal": "true"}
    async with (
        CTGOV.running(index) as (server, _),
        aiohttp.ClientSession() as session,
        session.get(server.studies_url, params=parameters) as response,
    ):
        return response.status, response.content_type, await response.text()
