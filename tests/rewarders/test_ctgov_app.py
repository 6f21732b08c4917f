"""The local ClinicalTrials.gov over real HTTP: wire format, errors, paging, filters, quota, start and stop."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from rewarders.servers.ctgov import Index, serve
from rewarders.servers.hosting import SearchServerError
from tests.rewarders.ctgov.serving import TRIALS, Client, record, served, settings_of, small_index


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return small_index(tmp_path_factory.mktemp("served"))


@pytest.fixture
async def client(index: Index) -> AsyncIterator[Client]:
    async with served(index) as client:
        yield client


# The wire.


async def test_an_answer_of_ids_only(client: Client) -> None:
    body = await client.page(query_term="word7", fields="NCTId", countTotal="true")
    assert body == {
        "studies": [{"protocolSection": {"identificationModule": {"nctId": "NCT00000007"}}}],
        "totalCount": 1,
    }


async def test_whole_records_and_projections(client: Client) -> None:
    assert (await client.page(query_term="word7"))["studies"] == [record(7)]
    projected = (await client.page(query_term="word17", fields="NCTId|Phase,InterventionName"))["studies"]
    assert projected == [
        {
            "protocolSection": {
                "identificationModule": {"nctId": "NCT00000017"},
                "designModule": {},
                "armsInterventionsModule": {"interventions": [{"name": "Aspirin"}]},
            }
        }
    ]
    branch = (await client.page(query_term="word7", fields="protocolSection.designModule,Phase,HasResults"))["studies"]
    assert branch == [
        {"protocolSection": {"designModule": record(7)["protocolSection"]["designModule"]}, "hasResults": False}
    ]


async def test_counts_are_on_the_first_page_only_and_only_if_asked_for(client: Client) -> None:
    first = await client.page(query_term="heart", pageSize="20", countTotal="true", fields="NCTId")
    assert list(first) == ["studies", "totalCount", "nextPageToken"]
    second = await client.page(
        query_term="heart", pageSize="20", countTotal="true", fields="NCTId", pageToken=first["nextPageToken"]
    )
    assert list(second) == ["studies"]
    assert len(second["studies"]) == 10
    assert "totalCount" not in await client.page(query_term="heart")


async def test_a_full_page_names_the_next_one_even_if_that_is_empty(client: Client) -> None:
    first = await client.page(query_term="heart", pageSize="30", fields="NCTId")
    assert len(first["studies"]) == 30
    assert await client.page(query_term="heart", pageSize="30", pageToken=first["nextPageToken"]) == {"studies": []}


@pytest.mark.parametrize(("size", "sent"), [("", 10), ("0", 10), ("7", 7), ("99999", 30)])
async def test_page_sizes(client: Client, size: str, sent: int) -> None:
    assert len((await client.page(query_term="heart", pageSize=size))["studies"]) == sent


async def test_a_token_holds_a_place_and_not_the_query(client: Client) -> None:
    """So it is at the service: a token given with another query goes on at the same place of that one."""
    token = (await client.page(query_term="heart", pageSize="5"))["nextPageToken"]
    assert await client.numbers(query_term="aspirin", pageToken=token) == list(range(5, 30))


async def test_without_a_query_all_trials_are_found(client: Client) -> None:
    assert (await client.page(countTotal="true"))["totalCount"] == TRIALS
    assert (await client.page(countTotal="true", query_term="  "))["totalCount"] == TRIALS


async def test_version(client: Client, index: Index) -> None:
    async with client.session.get(f"{client.server.base_url}/api/v2/version") as response:
        body = await response.json()
    assert body == {"apiVersion": "2.0.5", "dataTimestamp": index.data_timestamp}
    assert body["dataTimestamp"].startswith("2020-06-15T")
    async with served(index, data_timestamp="2026-08-07T09:00:05") as other:
        url = f"{other.server.base_url}/api/v2/version"
        assert '"2026-08-07T09:00:05"' in await (await other.session.get(url)).text()


@pytest.mark.parametrize(("method", "path"), [("GET", "/"), ("GET", "/ct2/results"), ("POST", "/api/v2/studies")])
async def test_other_places_are_html_pages(client: Client, method: str, path: str) -> None:
    async with client.session.request(method, client.server.base_url + path) as response:
        assert (response.status, response.content_type) == (404, "text/html")


async def test_a_long_address_is_refused(client: Client) -> None:
    status, text, _ = await client.get(query_term="x" * 9000)
    assert status == 414
    assert text.startswith("<html>")


# Parameters.


async def test_each_query_has_its_area_and_all_must_hold(client: Client) -> None:
    assert await client.numbers(query_titles="word3 OR word4") == [3, 4]
    assert await client.numbers(query_cond="angina", query_titles="word3") == [3]
    assert await client.numbers(query_cond="aspirin") == []
    assert await client.numbers(query_intr="aspirin AND word5") == [5]
    assert await client.numbers(query_id="NCT00000009") == [9]
    assert (
        await client.numbers(query_term="Größe más word8") == await client.numbers(query_term="grosse MAS word8") == [8]
    )


async def test_filters(client: Client) -> None:
    assert await client.numbers(query_term="heart", filter_ids="NCT00000003, NCT00000001|NCT00099999") == [1, 3]
    assert len(await client.ids(filter_overallStatus="RECRUITING")) == TRIALS / 2
    assert len(await client.ids(postFilter_overallStatus="RECRUITING,COMPLETED")) == TRIALS
    dates = "AREA[StudyFirstPostDate]RANGE[2015-01-01,2017-06-14]"
    assert await client.numbers(query_term="heart", filter_advanced=dates) == [4, 5]
    assert await client.numbers(filter_advanced=dates, postFilter_advanced="word4", filter_ids="NCT00000004") == [4]


async def test_a_query_of_ids_only_finds_any_of_them_and_ignores_filters(client: Client) -> None:
    for query in ("NCT00000003, nct00000001", "NCT00000001 NCT00000003"):
        assert await client.numbers(query_term=query, filter_advanced="word9", filter_ids="NCT00000009") == [1, 3]
    assert await client.numbers(query_term="NCT00000003 OR NCT00000001", filter_ids="NCT00000001") == [1]


async def test_sorts(client: Client) -> None:
    newest_first = list(range(TRIALS))
    assert await client.numbers(query_term="heart", sort="StudyFirstPostDate") == newest_first
    assert await client.numbers(query_term="heart", sort="StudyFirstPostDate:asc") == newest_first[::-1]
    assert (await client.numbers(sort="EnrollmentCount:desc"))[:3] == [9, 8, 7]
    assert (await client.numbers(sort="EnrollmentCount"))[:3] == [0, 1, 2]
    assert (await client.numbers(query_term="word7 OR heart", sort="@relevance"))[0] == 7


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"query_badfield": "x"}, "`query.badfield` is unknown parameter"),
        ({"page": "2"}, "`page` is unknown parameter"),
        ({"filter_geo": "distance(1,2,3mi)"}, "`filter.geo` is not supported by this server"),
        ({"filter_ids": "NCT00000001,XYZ"}, "Item 2 in parameter `filter.ids` has incorrect format"),
        ({"filter_overallStatus": "BOGUS"}, "Invalid value in parameter `overallStatus`: `BOGUS`"),
        ({"sort": "EnrollmentCount:descending"}, "Item 1 in parameter `sort` has incorrect format"),
        ({"sort": "Bogus:desc"}, "Unknown sort field"),
        ({"sort": "EnrollmentCount descending"}, "Unknown sort field"),
        ({"sort": "BriefTitle"}, "Unsupported sort field type: text"),
        ({"sort": "StartDate,StartDate,StartDate"}, "Parameter `sort` must contain no more than 2 items"),
        ({"pageToken": "Zm9v"}, "Parameter `pageToken` has incorrect format"),
        ({"pageToken": "é"}, "Parameter `pageToken` has incorrect format"),
        ({"pageSize": "-1"}, "Parameter `pageSize` has incorrect format"),
        ({"countTotal": "yes"}, "Parameter `countTotal` has incorrect format"),
        ({"fields": ","}, "Parameter `fields` must not be empty"),
        (
            {"query_cond": "diabetes)"},
            "Error parsing query in Conditions or disease: extraneous input ')' expecting <EOF>",
        ),
    ],
)
async def test_what_is_not_understood_is_refused_in_plain_text(
    client: Client, parameters: dict[str, str], text: str
) -> None:
    assert await client.refusal(**parameters) == text


# Quota, latency, hosting.


async def test_the_quota_answers_429(index: Index) -> None:
    async with served(index, quota=3, window_s=30, retry_after_s=4) as client:
        statuses = [await client.get(query_term="heart") for _ in range(5)]
        assert [status for status, _, _ in statuses] == [200, 200, 200, 429, 429]
        assert statuses[-1][2]["Retry-After"] == "4"
        async with client.session.get(f"{client.server.base_url}/health") as response:
            assert await response.json() == {"status": "ok", "documents": TRIALS, "requests": 5, "refused": 2}


async def test_latency(index: Index) -> None:
    async with served(index, latency_ms=120, jitter_ms=10) as client:
        began = time.monotonic()
        await asyncio.gather(*(client.get(query_term="heart") for _ in range(10)))
        assert 0.12 <= time.monotonic() - began < 1.2


async def test_a_taken_port_is_one_clear_line(index: Index) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(SearchServerError, match="is in use"):
            await serve(settings_of(port=taken.getsockname()[1]), index)
    with pytest.raises(SearchServerError, match="cannot listen"):
        await serve(settings_of(port=99_999), index)


def test_run_says_where_it_listens_and_ends_on_sigterm(tmp_path: Path) -> None:
    (tmp_path / "studies.json").write_text(json.dumps([record(number) for number in range(3)]))
    code = (
        "import sys; from pathlib import Path; from rewarders.servers.ctgov import ServerSettings, run; "
        "run(ServerSettings(corpus=Path(sys.argv[1]), cache_folder=Path(sys.argv[1]) / 'cache', quota=7))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert "/api/v2/studies (3 trials, quota 7 per 1 s)" in line
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.stdout.close()
