"""What the faults of both local search servers have in common, and what their clients make of them."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import aiohttp
import pytest

from rewarders.engines.base import BadQuery, EngineMisconfigured, EngineUnavailable, SearchRequest
from rewarders.retry import Retrier, RetryPolicy
from rewarders.servers.faults import Fault, FaultPlan, Outage
from rewarders.servers.hosting import SearchServerError
from rewarders.servers.traffic import ServerSettings
from tests.rewarders.faulty_service import CTGOV, DOCUMENTS, PUBMED, SERVICES, Service

HEART = SearchRequest("heart", retmax=50)
ALMOST_ALL = 0.999999  # a rate below 1 that the tests' few draws never miss
KINDS = [(service, kind) for service in SERVICES for kind in service.kinds]
QUICK = [(service, kind) for service in SERVICES for kind in service.quick]
VARIANTS = [(PUBMED, "BACKEND"), (PUBMED, "TRUNCATED"), (CTGOV, "INCOMPLETE"), (CTGOV, "TRUNCATED")]
DETAILS = [
    *((service, kind, 0.5) for service, kind in KINDS),
    *((service, service.kinds[name], detail) for service, name in VARIANTS for detail in (0.0, 0.999)),
]


@pytest.fixture(scope="module")
def indexes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {service.name: service.build(tmp_path_factory.mktemp(service.name)) for service in SERVICES}


def named(value: Any) -> str | None:
    return getattr(value, "name", None)


def patient(attempts: int) -> Retrier:
    async def no_wait(_: float) -> None:
        await asyncio.sleep(0)

    return Retrier(RetryPolicy(attempts=attempts, max_wait_s=100.0, budget_burst=1000.0), sleep=no_wait)


def test_the_kinds_the_fault_soak_needs_are_there() -> None:
    common = {"RATE_LIMIT", "SERVER_ERROR", "LATE", "CLOSED", "RESET", "HTML_200", "TRUNCATED"}
    assert common | {"BACKEND", "EMPTY"} <= set(PUBMED.kinds.__members__)
    assert common | {"INCOMPLETE"} <= set(CTGOV.kinds.__members__)


@pytest.mark.parametrize(("service", "kind", "detail"), DETAILS, ids=named)
async def test_every_kind_is_an_outage_that_costs_one_request(
    indexes: dict[str, Any], monkeypatch: pytest.MonkeyPatch, service: Service, kind: Any, detail: float
) -> None:
    service.always(monkeypatch, Fault(kind, detail))
    async with service.running(indexes[service.name]) as (_, engine):
        asked: list[Any] = [lambda: engine.search(HEART)]
        if service is CTGOV:
            asked.append(engine.data_version)
        for ask in asked:
            before = engine.requests_sent
            with pytest.raises(EngineUnavailable) as caught:
                await ask()
            assert not isinstance(caught.value, EngineMisconfigured), "such an outage would not be retried"
            assert engine.requests_sent == before + 1, "no canary is needed to see it"


@pytest.mark.parametrize(("service", "kind"), KINDS, ids=named)
async def test_every_kind_on_any_page_is_tried_again(
    indexes: dict[str, Any], monkeypatch: pytest.MonkeyPatch, service: Service, kind: Any
) -> None:
    for place in range(3 if service is CTGOV else 1):
        service.always(monkeypatch, *[None] * place, Fault(kind, 0.5), None)
        async with service.running(indexes[service.name]) as (_, engine):
            retrier = patient(2)
            found = await retrier.run(lambda engine=engine: engine.search(HEART))
        assert (len(found.ids), found.count, retrier.retries) == (DOCUMENTS, DOCUMENTS, 1)


@pytest.mark.parametrize(("service", "kind"), QUICK, ids=named)
async def test_a_wrong_query_is_never_an_outage_for_good(
    indexes: dict[str, Any], monkeypatch: pytest.MonkeyPatch, service: Service, kind: Any
) -> None:
    service.always(monkeypatch, Fault(kind, 0.5), None)
    async with service.running(indexes[service.name]) as (_, engine):
        with pytest.raises(EngineUnavailable):
            await engine.search(SearchRequest("((heart", retmax=5))
        with pytest.raises(BadQuery):
            await engine.search(SearchRequest("((heart", retmax=5))


@pytest.mark.parametrize("service", SERVICES, ids=named)
async def test_a_late_answer_is_a_good_one(
    indexes: dict[str, Any], monkeypatch: pytest.MonkeyPatch, service: Service
) -> None:
    service.always(monkeypatch, Fault(service.kinds.LATE, 0.0))
    async with service.running(indexes[service.name], timeout_s=30.0, fault_late_s=0.2) as (_, engine):
        began = asyncio.get_running_loop().time()
        assert (await engine.search(SearchRequest("word3", retmax=5))).ids == (service.document(3),)
        assert asyncio.get_running_loop().time() - began >= 0.2


@pytest.mark.parametrize("service", SERVICES, ids=named)
async def test_in_an_outage_everything_fails_and_after_it_nothing(indexes: dict[str, Any], service: Service) -> None:
    changes = {"fault_late_s": 0.0, "outage_s": 1.5}
    answered = failed = 0
    async with service.running(indexes[service.name], timeout_s=30.0, **changes) as (_, engine):
        began = asyncio.get_running_loop().time()
        while answered < 20:
            before = asyncio.get_running_loop().time() - began
            try:
                await engine.search(SearchRequest("word3", retmax=5))
            except EngineUnavailable:
                assert answered == 0
                failed += 1
            else:
                answered += before > 1.5
    assert failed > 0


@pytest.mark.parametrize("service", SERVICES, ids=named)
async def test_health_counts_the_faults(indexes: dict[str, Any], service: Service) -> None:
    changes = {"fault_rate": ALMOST_ALL, "fault_late_s": 0.0}
    async with service.running(indexes[service.name], **changes) as (server, engine):
        for _ in range(30):
            try:
                await engine.search(SearchRequest("word3", retmax=5))
            except EngineUnavailable:
                continue
        async with aiohttp.ClientSession() as session, session.get(f"{server.base_url}/health") as response:
            health = await response.json()
    assert health["requests"] == sum(health["faults"].values()) == 30
    assert len(health["faults"]) >= 6


@pytest.mark.parametrize("service", SERVICES, ids=named)
def test_the_sequence_is_the_seeds_and_the_share_is_the_rate(service: Service) -> None:
    drawn = [service.faults(FaultPlan(rate=0.1, seed=seed)) for seed in (1, 1, 2)]
    sequences = [[faults.draw(0.0) for _ in range(20_000)] for faults in drawn]
    assert sequences[0] == sequences[1]
    assert sequences[0] != sequences[2]
    failed = Counter(fault.kind for fault in sequences[0] if fault is not None)
    assert abs(failed.total() / 20_000 - 0.1) < 0.01
    assert min(failed[kind] for kind in service.kinds) > 0.5 * failed.total() / len(service.kinds)
    assert drawn[0].counts == {kind.value: count for kind, count in failed.items()}


@pytest.mark.parametrize("service", SERVICES, ids=named)
def test_an_outage_has_a_beginning_and_an_end(service: Service) -> None:
    faults = service.faults(FaultPlan(outage=Outage(at_s=10.0, lasts_s=60.0)))
    fates = {elapsed: faults.draw(elapsed) is not None for elapsed in (0.0, 9.99, 10.0, 69.99, 70.0, 1e6)}
    assert [elapsed for elapsed, failed in fates.items() if failed] == [10.0, 69.99]


@pytest.mark.parametrize("service", SERVICES, ids=named)
def test_without_a_rate_nothing_fails(service: Service) -> None:
    faults = service.faults(FaultPlan())
    assert {faults.draw(float(second)) for second in range(1000)} == {None}


@pytest.mark.parametrize(
    "changes",
    [
        {"fault_rate": 1.0},
        {"fault_rate": -0.1},
        {"fault_late_s": -1.0},
        {"outage_s": -1.0},
        {"quota": 0},
        {"latency_ms": -1},
    ],
)
@pytest.mark.parametrize("settings", [ServerSettings, *(service.settings for service in SERVICES)])
def test_impossible_settings_are_refused(settings: Any, changes: dict[str, Any]) -> None:
    with pytest.raises(SearchServerError, match=r"fault rate|negative|quota"):
        settings(corpus="unused", **changes)
