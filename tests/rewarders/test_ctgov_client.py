"""What the ClinicalTrials.gov client sends, how it pages and how it uses connections."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from rewarders.engines.base import BadQuery, EngineMisconfigured, EngineUnavailable, SearchRequest, SearchResult
from rewarders.engines.ctgov import CtGovSettings
from tests.rewarders.ctgov.fake_ctgov import VERSION, FakeCtGov, good, page, paged, trials
from tests.rewarders.fake_upstream import Parameters, always, search, unavailable
from tests.rewarders.recording_permit import recording, requests_under_permits

DATA = os.environ.get("DEEPRETRIEVAL_DATA")
needs_recorded = pytest.mark.skipif(DATA is None, reason="needs DEEPRETRIEVAL_DATA")
HOSTILE = (
    "a&pageSize=0&fields=NCTId&query.cond=x#frag +100% (é OR \U0001f9ec) ; AREA[Phase]PHASE3 \\ \x00 \x7f %00 %26 = ?"
)


# Requests.


async def test_a_search_is_one_get_for_ids_only(ctgov: FakeCtGov) -> None:
    async with ctgov.engine(tool="tool", email="a@b.org") as engine:
        found = await engine.search(SearchRequest("heart  AND\n aspirin", retmax=2, sort="relevance"))
    assert found == SearchResult(ids=("NCT00000001", "NCT00000002"), count=3)
    assert ctgov.received == [
        {
            "query.term": "heart AND aspirin",
            "fields": "NCTId",
            "pageSize": "2",
            "countTotal": "true",
            "sort": "@relevance",
        }
    ]
    assert ctgov.agents == ["tool (asynchronous search client; a@b.org)"]


@pytest.mark.parametrize("term", [HOSTILE, "&pageSize=0", "a\u2028b", "x" * 5000, "a\ufffeb", "é" * 700])
async def test_whatever_a_query_holds_stays_one_parameter(ctgov: FakeCtGov, term: str) -> None:
    await search(ctgov, term, retmax=50)
    expected = {"query.term": " ".join(term.split()), "pageSize": "50", "fields": "NCTId", "countTotal": "true"}
    assert ctgov.received == [{**expected, "sort": "@relevance"}]


@pytest.mark.parametrize("term", ["\x00", "***", "\u200b", '"" ()', "a\ud800", "\ud800 heart"])
async def test_a_query_the_service_would_read_as_none_is_never_sent(ctgov: FakeCtGov, term: str) -> None:
    """Without a query it answers with every trial it has."""
    with pytest.raises(BadQuery):
        await search(ctgov, term)
    assert ctgov.received == []


@pytest.mark.parametrize(
    ("sort", "sent"),
    [
        ("relevance", "@relevance"),
        ("pub_date", "StudyFirstPostDate:desc"),
        ("unsorted", None),
        ("EnrollmentCount:desc", "EnrollmentCount:desc"),
    ],
)
async def test_sorts_have_names_of_ours(ctgov: FakeCtGov, sort: str, sent: str | None) -> None:
    async with ctgov.engine() as engine:
        await engine.search(SearchRequest("a", retmax=3, sort=sort))
    assert ctgov.received[0].get("sort") == sent


async def test_an_impossible_sort_is_our_fault_and_costs_no_request(ctgov: FakeCtGov) -> None:
    async with ctgov.engine() as engine:
        with pytest.raises(EngineMisconfigured, match="no such sort"):
            await engine.search(SearchRequest("a", retmax=3, sort="StartDate:asc&pageSize=0"))
    assert ctgov.received == []


@pytest.mark.parametrize(
    ("dates", "sent"),
    [
        ((None, None), None),
        ((None, "2014"), "AREA[StudyFirstPostDate]RANGE[MIN,2014-12-31]"),
        ((None, "2016/02"), "AREA[StudyFirstPostDate]RANGE[MIN,2016-02-29]"),
        (("2014/9", "2014/09/31"), "AREA[StudyFirstPostDate]RANGE[2014-09-01,2014-09-30]"),
        (("2014/09/09", None), "AREA[StudyFirstPostDate]RANGE[2014-09-09,MAX]"),
    ],
)
async def test_dates_are_sent_where_a_request_has_them(
    ctgov: FakeCtGov, dates: tuple[str | None, str | None], sent: str | None
) -> None:
    async with ctgov.engine() as engine:
        await engine.search(SearchRequest("a", retmax=3, min_date=dates[0], max_date=dates[1]))
    assert ctgov.received[0].get("filter.advanced") == sent


async def test_the_dated_field_can_be_chosen_and_no_date_is_invented(ctgov: FakeCtGov) -> None:
    async with ctgov.engine(date_field="StartDate") as engine:
        await engine.search(SearchRequest("a", retmax=3, max_date="2020/01/01"))
        with pytest.raises(EngineMisconfigured, match="no date"):
            await engine.search(SearchRequest("a", retmax=3, max_date="2020/13/01"))
    assert [query["filter.advanced"] for query in ctgov.received] == ["AREA[StartDate]RANGE[MIN,2020-01-01]"]


@pytest.mark.parametrize(
    "options",
    [
        {"base_url": "clinicaltrials.gov"},
        {"base_url": "https://user:secret@host"},
        {"page_size": 1001},
        {"page_size": 0},
        {"max_connections": 0},
        {"date_field": "StartDate]RANGE[MIN,MAX"},
        {"email": "a@b.org\r\nX-Header: 1"},
        {"tool": "tööl"},
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must") as caught:
        CtGovSettings(**options)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("base_url", "url"),
    [
        ("https://clinicaltrials.gov", "https://clinicaltrials.gov/api/v2"),
        ("http://127.0.0.1:80/", "http://127.0.0.1:80/api/v2"),
        ("http://host/mirror/", "http://host/mirror"),
    ],
)
def test_address_is_a_host_or_a_folder(base_url: str, url: str) -> None:
    assert CtGovSettings(base_url=base_url).api_url == url


# Paging.


async def test_pages_are_walked_with_the_same_parameters(ctgov: FakeCtGov) -> None:
    ctgov.respond = paged(trials(1, 25))
    found = await search(ctgov, retmax=3000, page_size=10)
    assert found == SearchResult(ids=tuple(trials(1, 25)), count=25)
    tokens = [query.pop("pageToken", None) for query in ctgov.received]
    assert tokens == [None, "10", "20"]
    assert ctgov.received == [ctgov.received[0]] * 3


async def test_no_page_is_asked_for_that_is_not_needed(ctgov: FakeCtGov) -> None:
    ctgov.respond = paged(trials(1, 2500))
    assert len((await search(ctgov, retmax=2000)).ids) == 2000
    assert len(ctgov.received) == 2
    ctgov.received.clear()
    # The last page is full, so it names a next one, which would be empty.
    ctgov.respond = paged(trials(1, 2000))
    assert (await search(ctgov, retmax=3000)).count == 2000
    assert len(ctgov.received) == 2


async def test_results_are_cut_at_retmax_and_counted_in_full(ctgov: FakeCtGov) -> None:
    ctgov.respond = paged(trials(1, 95))
    found = await search(ctgov, retmax=25, page_size=10)
    assert found == SearchResult(ids=tuple(trials(1, 25)), count=95)
    assert len(ctgov.received) == 3


async def test_an_empty_page_is_passed_over(ctgov: FakeCtGov) -> None:
    pages = {None: page(trials(1, 2), 3, "a"), "a": page([], None, "b"), "b": page(trials(3, 3))}
    ctgov.respond = lambda query: web.json_response(pages[query.get("pageToken")])
    assert (await search(ctgov)).ids == tuple(trials(1, 3))


async def test_no_hits_is_a_result(ctgov: FakeCtGov) -> None:
    ctgov.respond = always(page([], 0))
    assert await search(ctgov) == SearchResult(ids=(), count=0)


async def test_duplicates_are_removed_and_mentioned(ctgov: FakeCtGov) -> None:
    pages = {None: page(trials(1, 3), 5, "a"), "a": page(trials(3, 4))}
    ctgov.respond = lambda query: web.json_response(pages[query.get("pageToken")])
    found = await search(ctgov)
    assert (found.ids, found.count) == (tuple(trials(1, 4)), 5)
    assert found.warnings == ("1 trials were sent twice",)


@pytest.mark.parametrize(
    ("pages", "reason"),
    [
        ({None: page(trials(1, 3))}, "totalCount is missing"),
        ({None: page([], 5)}, "0 trials received where 5"),
        ({None: page(trials(1, 3), 5)}, "3 trials received where 5"),
        ({None: page(trials(1, 3), 2)}, "3 trials received where 2"),
        ({None: page(trials(1, 3), 5, "a"), "a": page(trials(4, 4))}, "4 trials received where 5"),
        ({None: page(trials(1, 3), 5, "a"), "a": page(trials(4, 7))}, "7 trials received where 5"),
        ({None: page(trials(1, 3), 5, "a"), "a": page(trials(4, 4), None, "a")}, "names itself"),
        (
            {None: page([], 5, "a"), "a": page([], None, "b"), "b": page([], None, "a")},
            "paging does not end",
        ),
    ],
)
async def test_what_is_not_complete_is_no_result(
    ctgov: FakeCtGov, pages: dict[str | None, dict[str, Any]], reason: str
) -> None:
    caught = await unavailable(ctgov, lambda query: web.json_response(pages[query.get("pageToken")]))
    assert reason in caught.reason
    assert len(ctgov.received) < 15


async def test_a_failing_later_page_fails_the_search_and_is_never_a_bad_query(ctgov: FakeCtGov) -> None:
    for status, text in ((500, "<html>"), (400, "Error parsing query in Other terms: no"), (400, "what"), (414, "")):
        first = paged(trials(1, 25))
        ctgov.respond = lambda query, first=first, status=status, text=text: (  # type: ignore[misc]
            web.Response(status=status, text=text) if "pageToken" in query else first(query)
        )
        ctgov.received.clear()
        await unavailable(ctgov, page_size=10)
        assert len(ctgov.received) == 2


@needs_recorded
async def test_recorded_pages_are_read(ctgov: FakeCtGov) -> None:
    folder = Path(str(DATA)) / "fixtures_ctgov"
    first, following, whole = (
        (folder / f"biomcp_ctgov_search_phelan_{name}_20260811.json").read_text()
        for name in ("limit5", "next", "limit50")
    )

    def respond(query: Parameters) -> web.Response:
        text = following if "pageToken" in query else first
        return web.Response(text=text, content_type="application/json")

    ctgov.respond = respond
    found = await search(ctgov, retmax=10, page_size=5)
    assert (len(found.ids), found.count) == (10, 21)
    assert ctgov.received[1]["pageToken"] == "ZVt07cGHkvI2wRk2CJf6_LLq14bEL8swd7KrgP4dnDeTsPkw"
    assert all(trial.startswith("NCT") for trial in found.ids)
    ctgov.respond = lambda _: web.Response(text=whole, content_type="application/json")
    assert (await search(ctgov, retmax=50)).count == 3


# The version of the data.


async def test_the_version_is_asked_for_once_by_all_who_want_it(ctgov: FakeCtGov) -> None:
    async with ctgov.engine() as engine:
        assert engine.data_timestamp is None
        versions = await asyncio.gather(*(engine.data_version() for _ in range(10)))
        assert set(versions) == {VERSION["dataTimestamp"]}
        assert engine.data_timestamp == VERSION["dataTimestamp"]
    assert ctgov.versions_asked == 1


async def test_the_version_is_asked_for_again_after_a_while(ctgov: FakeCtGov) -> None:
    async with ctgov.engine(version_ttl_s=0.0) as engine:
        await engine.data_version()
        ctgov.versions = always({"dataTimestamp": "2026-08-10T09:00:05"})
        assert await engine.data_version() == "2026-08-10T09:00:05"


@pytest.mark.parametrize("body", ["{}", '{"dataTimestamp": ""}', '{"dataTimestamp": 5}', "<html>", "", '{"dataTime'])
async def test_a_version_that_cannot_be_read_is_an_outage(ctgov: FakeCtGov, body: str) -> None:
    ctgov.versions = always(body)
    async with ctgov.engine() as engine:
        with pytest.raises(EngineUnavailable):
            await engine.data_version()
        assert engine.data_timestamp is None


# Connections and permits.


async def test_every_page_takes_a_permit_of_its_own(ctgov: FakeCtGov) -> None:
    events: list[str] = []
    ctgov.respond = paged(trials(1, 25))
    async with ctgov.engine(page_size=10, permit=recording(ctgov, events)) as engine:
        await engine.search(SearchRequest("a", retmax=30))
        assert engine.requests_sent == 3
    assert events == requests_under_permits(3)


async def test_closing_ends_searches_that_wait_for_a_connection(ctgov: FakeCtGov) -> None:
    async def hang(query: Parameters) -> web.StreamResponse:
        await asyncio.sleep(30)
        return good(query)

    ctgov.respond = hang
    engine = ctgov.engine(max_connections=1, timeout_s=20.0)
    await engine.start()
    running = [asyncio.create_task(engine.search(SearchRequest(f"q{n}", retmax=1))) for n in range(3)]
    while not ctgov.received:
        await asyncio.sleep(0.01)
    await engine.close()
    ended = await asyncio.wait_for(asyncio.gather(*running, return_exceptions=True), timeout=15)
    assert [error for error in ended if not isinstance(error, EngineUnavailable)] == []
    assert len(ctgov.received) == 1


async def test_a_version_that_is_answered_is_no_proof_that_searches_are(ctgov: FakeCtGov) -> None:
    """Two queries are refused; while the first waits for its canary, the version is answered."""
    async with ctgov.engine() as engine:

        async def refuse(query: Parameters) -> web.StreamResponse:
            if query["query.term"] == "cancer":
                await engine.data_version()
            return ctgov.unexplained()

        ctgov.respond = refuse
        requests = [SearchRequest(term, retmax=1, sort="relevance") for term in ("a", "b")]
        ended = await asyncio.gather(*(engine.search(request) for request in requests), return_exceptions=True)
    assert [type(error) for error in ended] == [EngineUnavailable] * 2
