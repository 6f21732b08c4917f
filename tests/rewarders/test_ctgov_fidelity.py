"""Our client against our ClinicalTrials.gov, and that server against recordings of the real one."""

from __future__ import annotations

import json
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest

from rewarders.engines.base import BadQuery, EngineMisconfigured, EngineUnavailable, SearchRequest, SearchResult
from rewarders.engines.ctgov import CtGovEngine, CtGovSettings
from rewarders.servers.ctgov import EssieError, Index, RunningServer, Search, parse, serve
from tests.rewarders.ctgov.serving import TRIALS, Client, served, settings_of, small_index

DATA = os.environ.get("DEEPRETRIEVAL_DATA")
needs_recorded = pytest.mark.skipif(DATA is None, reason="needs DEEPRETRIEVAL_DATA")


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return small_index(tmp_path_factory.mktemp("served"))


@pytest.fixture
async def client(index: Index) -> AsyncIterator[Client]:
    async with served(index) as client:
        yield client


# Our client against it.


def engine_of(server: RunningServer, **options: Any) -> CtGovEngine:
    return CtGovEngine(CtGovSettings(base_url=server.base_url, **options))


async def test_the_client_finds_what_the_index_holds(client: Client, index: Index) -> None:
    async with engine_of(client.server, page_size=7) as engine:
        await engine.check()
        assert engine.data_timestamp == await engine.data_version() == index.data_timestamp
        found = await engine.search(SearchRequest("heart", retmax=3000))
        assert found == SearchResult(ids=tuple(f"NCT{n:08d}" for n in range(TRIALS)), count=TRIALS)
        cut = await engine.search(SearchRequest("heart", retmax=10))
        assert (cut.ids, cut.count) == (found.ids[:10], TRIALS)
        bounded = await engine.search(SearchRequest("heart", retmax=50, min_date="2015", max_date="2017/06/14"))
        assert bounded.ids == ("NCT00000004", "NCT00000005")
        assert (await engine.search(SearchRequest("Größe AND más", retmax=5, sort="relevance"))).count == TRIALS


@pytest.mark.parametrize("query", ["heart)", '"heart', "heart[tiab]", "AREA[Nothing]x", "a OR", "x" * 9000, "w " * 14])
async def test_a_query_that_is_refused_is_a_bad_query(client: Client, query: str) -> None:
    async with engine_of(client.server) as engine:
        with pytest.raises(BadQuery):
            await engine.search(SearchRequest(query, retmax=5))
        assert engine.requests_sent == 1


async def test_other_failures_of_the_server_are_not_the_query_s(index: Index) -> None:
    async with await serve(settings_of(quota=1, window_s=30, retry_after_s=4), index) as server:
        async with engine_of(server) as engine:
            with pytest.raises(EngineMisconfigured, match="Unknown sort field"):
                await engine.search(SearchRequest("heart", retmax=5, sort="Bogus"))
            with pytest.raises(EngineUnavailable, match="rate limit") as caught:
                await engine.search(SearchRequest("heart", retmax=5))
            assert caught.value.retry_after_s == 4.0
        async with engine_of(server, date_field="Bogus") as engine:
            with pytest.raises(EngineUnavailable):
                await engine.search(SearchRequest("heart", retmax=5, max_date="2020"))


@pytest.mark.parametrize(
    "query",
    [
        "word3 OR word4 &pageSize=0",
        "word3&query.cond=nothing&countTotal=false",
        "word3\nOR\r\nword4",
        "word3 \x00 OR word4\x00",
        "word3#fragment",
        "word3+word3 100%25",
        "ｗｏｒｄ３ OR “word4”",
        "AREA[StudyFirstPostDate]RANGE[MIN,MAX] word4",
    ],
)
async def test_hostile_queries_mean_what_their_text_means(client: Client, index: Index, query: str) -> None:
    request = SearchRequest(query, retmax=50)
    node = parse(request.term)
    assert node is not None
    total, ids = index.search(Search(queries=(node,)))
    async with engine_of(client.server) as engine:
        assert await engine.search(request) == SearchResult(ids=tuple(ids), count=total)


async def test_any_query_gets_the_index_s_answer_or_is_bad(client: Client, index: Index) -> None:
    rng = random.Random(5)
    parts = [
        "word1",
        "word2",
        "heart",
        "AND",
        "OR",
        "NOT",
        "(",
        ")",
        '"',
        "é",
        "&",
        "%",
        "+",
        "\x00",
        "AREA[BriefTitle]",
    ]
    verdicts = set()
    async with engine_of(client.server) as engine:
        for _ in range(150):
            request = SearchRequest(" ".join(rng.choices(parts, k=rng.randint(1, 6))), retmax=50)
            try:
                verdict: Any = await engine.search(request)
            except BadQuery:
                verdict = BadQuery
            verdicts.add(verdict if verdict is BadQuery else verdict.count)
            assert verdict == _expected(index, request), request.term
    assert BadQuery in verdicts
    assert len(verdicts) >= 5


def _expected(index: Index, request: SearchRequest) -> Any:
    if not any(character.isalnum() for character in request.term):
        return BadQuery
    try:
        node = parse(request.term)
    except EssieError:
        return BadQuery
    total, ids = index.search(Search(queries=(node,) if node else ()))
    return SearchResult(ids=tuple(ids), count=total)


# Against recordings of the service.

SEARCHES = (
    "age_count",
    "keytruda_limit3",
    "melanoma_recruiting_limit3",
    "nsclc_egfr_l858r",
    "phelan_limit5",
    "phelan_limit50",
)


def _recorded(name: str) -> Any:
    return json.loads((Path(str(DATA)) / "fixtures_ctgov" / name).read_text())


def _recorded_search(name: str) -> tuple[dict[str, str], Any]:
    """The parameters of a recorded search, and its answer."""
    receipts = {entry["path"]: entry.get("receipt") for entry in _recorded("biomcp_capture_receipts_subset.json")}
    url = receipts[f"ctgov/search_{name}_20260811.json"]["request"]
    return dict(parse_qsl(urlsplit(url).query)), _recorded(f"biomcp_ctgov_search_{name}_20260811.json")


@pytest.fixture(scope="module")
def recorded_index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """The studies of all recorded searches, as far as they were recorded."""
    folder = tmp_path_factory.mktemp("recorded")
    for name in SEARCHES:
        (folder / f"{name}.json").write_text(json.dumps(_recorded_search(name)[1]))
    return Index.of_corpus(folder, folder / "cache")


@needs_recorded
@pytest.mark.parametrize("name", SEARCHES)
async def test_recorded_requests_get_answers_of_the_recorded_form(recorded_index: Index, name: str) -> None:
    """The very parameters that were sent to the service, on the studies that it answered with."""
    parameters, recorded = _recorded_search(name)
    recorded.pop("nextPageToken", None)  # it depends on how much there is to find
    async with served(recorded_index) as client:
        ours = await client.page(**parameters)
    ours.pop("nextPageToken", None)
    assert {key: type(value) for key, value in ours.items()} == {key: type(value) for key, value in recorded.items()}
    assert ours["totalCount"] >= len(ours["studies"])


@needs_recorded
@pytest.mark.parametrize("name", SEARCHES)
async def test_recorded_studies_are_sent_as_the_service_sent_them(recorded_index: Index, name: str) -> None:
    """Asked for by their ids, with the recorded `fields` and a page that holds just as many."""
    parameters, recorded = _recorded_search(name)
    studies = recorded["studies"]
    asked = {
        "fields": parameters["fields"],
        "countTotal": "true",
        "pageSize": str(len(studies)),
        "filter.ids": ",".join(map(_id_of, studies)),
    }
    async with served(recorded_index) as client:
        ours = await client.page(**asked)
    assert {_id_of(study): study for study in ours["studies"]} == {_id_of(study): study for study in studies}
    assert ours["totalCount"] == len(studies)
    assert isinstance(ours["nextPageToken"], str)


def _id_of(study: Any) -> str:
    return str(study["protocolSection"]["identificationModule"]["nctId"])


@needs_recorded
@pytest.mark.parametrize(("name", "least"), [("phelan_limit50", 3), ("melanoma_recruiting_limit3", 2)])
async def test_recorded_searches_find_recorded_studies(recorded_index: Index, name: str, least: int) -> None:
    """Without synonyms not all of them, and nothing that was not recorded can be expected."""
    parameters, recorded = _recorded_search(name)
    async with served(recorded_index) as client:
        ours = await client.page(**parameters)
    found = {_id_of(study) for study in ours["studies"]}
    assert len(found & {_id_of(study) for study in recorded["studies"]}) >= least


REFUSED = {
    "`filter.studyType` is unknown parameter": {"filter_studyType": "INTERVENTIONAL"},
    "Parameter 'fields' contains invalid field name: 'StudyDesign'": {"fields": "StudyDesign"},
    "Error parsing query in advanced filter: Unknown area name: `NotARealField`": {
        "filter_advanced": "AREA[NotARealField]value"
    },
    "Error parsing query in Other terms: missing ')' at '<EOF>'": {"query_term": "diabetes (unmatched"},
    "Error parsing query in advanced filter: Allowed values": {"filter_advanced": "AREA[Phase]PHASE5"},
    "Error parsing query in Other terms: no viable": {"query_term": "rosuvastatin BCRP OATP1B1 ["},
}


@needs_recorded
@pytest.mark.parametrize("start", list(REFUSED))
async def test_refusals_are_the_recorded_ones(client: Client, start: str) -> None:
    entries = json.loads((Path(str(DATA)) / "fixtures_errors" / "error_bodies.json").read_text())
    (recorded,) = [entry["body"] for entry in entries if (entry["body"] or "").startswith(start)]
    ours = await client.refusal(**REFUSED[start])
    if "no viable" in start:  # what the grammar would have taken is not copied
        assert ours.split(" expecting ")[0].split(": ")[-1] in recorded
    else:
        assert ours == recorded
