"""The faults of the local ClinicalTrials.gov: what they look like on the wire, and that none ever becomes a result."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from rewarders.engines.base import BadQuery, EngineMisconfigured, EngineUnavailable, SearchRequest, SearchResult
from rewarders.engines.ctgov import CtGovEngine, CtGovSettings
from rewarders.retry import Retrier, RetryPolicy
from rewarders.servers.ctgov import Index, RunningServer, ServerSettings, serve
from rewarders.servers.ctgov.faults import Fault, FaultKind, Faults
from rewarders.servers.hosting import SearchServerError

TIMEOUT_S = 1.0
VARIANTS = [(kind, detail) for kind in (FaultKind.INCOMPLETE, FaultKind.TRUNCATED) for detail in (0.0, 0.999)]
QUICK = [kind for kind in FaultKind if kind is not FaultKind.LATE]  # without those that take a deadline each
HEART = SearchRequest("heart", retmax=50)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("faulty")
    rows = [{"_id": f"NCT{n:08d}", "title": f"Heart study {n}", "text": f"aspirin word{n}"} for n in range(20)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Index.of_corpus(folder, folder / "cache")


@asynccontextmanager
async def faulty(
    index: Index, timeout_s: float = TIMEOUT_S, **changes: Any
) -> AsyncIterator[tuple[RunningServer, CtGovEngine]]:
    settings = ServerSettings(corpus=Path("unused"), **{"fault_late_s": 30.0, **changes})
    async with await serve(settings, index) as server:
        client = CtGovSettings(base_url=server.base_url, timeout_s=timeout_s, page_size=8)
        async with CtGovEngine(client) as engine:
            yield server, engine


def always(monkeypatch: pytest.MonkeyPatch, *faults: Fault | None) -> None:
    """The server's fates from now on: the ones given, then the last of them for ever."""
    fates = list(faults)
    monkeypatch.setattr(Faults, "draw", lambda _: fates.pop(0) if len(fates) > 1 else fates[0])


async def _no_wait(_: float) -> None:
    await asyncio.sleep(0)


def retrier(attempts: int) -> Retrier:
    return Retrier(RetryPolicy(attempts=attempts, max_wait_s=100.0, budget_burst=1000.0), sleep=_no_wait)


@pytest.mark.parametrize(("kind", "detail"), [*((kind, 0.5) for kind in FaultKind), *VARIANTS])
async def test_every_kind_is_an_outage_that_costs_one_request(
    index: Index, monkeypatch: pytest.MonkeyPatch, kind: FaultKind, detail: float
) -> None:
    always(monkeypatch, Fault(kind, detail))
    async with faulty(index) as (_, engine):
        for ask in (lambda: engine.search(HEART), engine.data_version):
            before = engine.requests_sent
            with pytest.raises(EngineUnavailable) as caught:
                await ask()
            assert not isinstance(caught.value, EngineMisconfigured), "such an outage would not be retried"
            assert engine.requests_sent == before + 1, "no canary is needed to see it"


@pytest.mark.parametrize("kind", list(FaultKind))
@pytest.mark.parametrize("place", [0, 1, 2])
async def test_every_kind_on_any_page_is_tried_again(
    index: Index, monkeypatch: pytest.MonkeyPatch, kind: FaultKind, place: int
) -> None:
    always(monkeypatch, *[None] * place, Fault(kind, 0.5), None)
    async with faulty(index) as (_, engine):
        patient = retrier(2)
        found = await patient.run(lambda: engine.search(HEART))
    assert (len(found.ids), found.count, patient.retries) == (20, 20, 1)


@pytest.mark.parametrize("kind", QUICK)
async def test_a_wrong_query_is_never_an_outage_for_good(
    index: Index, monkeypatch: pytest.MonkeyPatch, kind: FaultKind
) -> None:
    always(monkeypatch, Fault(kind, 0.5), None)
    async with faulty(index) as (_, engine):
        with pytest.raises(EngineUnavailable):
            await engine.search(SearchRequest("((heart", retmax=5))
        with pytest.raises(BadQuery):
            await engine.search(SearchRequest("((heart", retmax=5))


async def test_with_faults_an_answer_is_the_true_one_or_none(index: Index) -> None:
    """Whatever fails in whatever order, no result is invented and none is cut."""
    rng = random.Random(0)
    queries = [" OR ".join(f"word{rng.randrange(20)}" for _ in range(rng.randint(1, 25))) for _ in range(60)]
    requests = [SearchRequest(f"({query}" if n % 10 == 9 else query, retmax=30) for n, query in enumerate(queries)]

    async def ask(engine: CtGovEngine, request: SearchRequest, attempts: int) -> SearchResult | str:
        try:
            return await retrier(attempts).run(lambda: engine.search(request))
        except BadQuery:
            return "bad"
        except EngineUnavailable:
            return "unavailable"

    async with faulty(index, timeout_s=30.0) as (_, engine):
        truth = [await ask(engine, request, 1) for request in requests]
    assert "unavailable" not in truth
    assert truth.count("bad") == 6
    outages = answered = 0
    for seed in range(3):
        async with faulty(index, fault_rate=0.2, fault_seed=seed, timeout_s=0.5) as (_, engine):
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
        always(monkeypatch, Fault(FaultKind[name], 0.5))
        assert (await _get(index))[:2] == (code, "text/html")
    always(monkeypatch, None)
    status, _, whole = await _get(index)
    assert status == 200
    always(monkeypatch, Fault(FaultKind.TRUNCATED, 0.5))
    status, _, cut = await _get(index)
    assert (status, whole.startswith(cut), 0 < len(cut) < len(whole)) == (200, True, True)
    always(monkeypatch, Fault(FaultKind.INCOMPLETE, 0.5))
    body = json.loads((await _get(index))[2])
    assert (body["totalCount"], len(body["studies"]), "nextPageToken" in body) == (20, 5, False)


async def _get(index: Index) -> tuple[int, str, str]:
    parameters = {"query.term": "heart", "fields": "NCTId", "countTotal": "true"}
    async with (
        faulty(index) as (server, _),
        aiohttp.ClientSession() as session,
        session.get(server.studies_url, params=parameters) as response,
    ):
        return response.status, response.content_type, await response.text()


async def test_a_late_answer_is_a_good_one(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch, Fault(FaultKind.LATE, 0.0))
    async with faulty(index, fault_late_s=0.2) as (_, engine):
        began = asyncio.get_running_loop().time()
        assert (await engine.search(SearchRequest("word3", retmax=5))).ids == ("NCT00000003",)
        assert asyncio.get_running_loop().time() - began >= 0.2


async def test_health_counts_the_faults(index: Index) -> None:
    async with faulty(index, fault_rate=0.999999, fault_late_s=0.0) as (server, engine):
        for _ in range(30):
            try:
                await engine.search(SearchRequest("word3", retmax=5))
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
    assert {Faults(0.0, 0, 1.0).draw() for _ in range(1000)} == {None}


@pytest.mark.parametrize(
    "changes", [{"fault_rate": 1.0}, {"fault_rate": -0.1}, {"fault_late_s": -1.0}, {"quota": 0}, {"latency_ms": -1}]
)
def test_impossible_settings_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(SearchServerError, match=r"fault rate|negative|quota"):
        ServerSettings(corpus=Path("unused"), **changes)
