"""Whose fault an answer of PubMed is: the query's, an outage's, or ours."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from rewarders.engines.base import (
    BadQuery,
    EngineMisconfigured,
    EngineUnavailable,
    SearchRequest,
)
from rewarders.engines.eutils_reply import read_reply
from rewarders.engines.verdicts import Undecided, retry_after_seconds
from tests.rewarders.fake_ncbi import KEY, OUTAGE, RATE_LIMIT, FakeNcbi, error, good, refuses, result
from tests.rewarders.fake_upstream import always, search, unavailable

DATA = os.environ.get("DEEPRETRIEVAL_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="set DEEPRETRIEVAL_DATA to replay recorded answers")


@pytest.mark.parametrize("status", [429, 200])
async def test_rate_limit_under_either_status(ncbi: FakeNcbi, status: int) -> None:
    caught = await unavailable(ncbi, always(RATE_LIMIT, status))
    assert caught.retry_after_s == 2.0
    assert "203.0.113.7" not in caught.reason
    assert len(ncbi.received) == 1


async def test_retry_after_is_honoured(ncbi: FakeNcbi) -> None:
    headers = {"Retry-After": "7"}
    assert (await unavailable(ncbi, always(RATE_LIMIT, 429, **headers))).retry_after_s == 7.0
    assert (await unavailable(ncbi, always("<html>", 503, "text/html", **headers))).retry_after_s == 7.0
    assert (await unavailable(ncbi, always("<html>", 503, "text/html"))).retry_after_s is None


@pytest.mark.parametrize(
    ("body", "status", "content_type"),
    [
        ("<html>down for maintenance</html>", 200, "text/html"),
        ("<html>Bad Gateway</html>", 502, "text/html"),
        ("<head> <title>NCBI/eutils202 - WWW Error 500 Diagnostic</title>", 500, "text/html"),
        ("Forbidden", 403, "text/plain"),
        ("", 200, "application/json"),
        (json.dumps(result(["1", "2"]))[:-20], 200, "application/json"),
        ("[]", 200, "application/json"),
        ("null", 200, "application/json"),
        ("{}", 200, "application/json"),
        ('{"esearchresult": []}', 200, "application/json"),
        ('{"error": "something new"}', 200, "application/json"),
        ('{"esearchresult": {"idlist": []}}', 200, "application/json"),
        ('{"esearchresult": {"count": "many", "idlist": []}}', 200, "application/json"),
        ('{"esearchresult": {"count": true, "idlist": ["1"]}}', 200, "application/json"),
        ('{"esearchresult": {"count": "1", "idlist": [1]}}', 200, "application/json"),
        ('{"esearchresult": {"count": "-1", "idlist": []}}', 200, "application/json"),
        (json.dumps(result([], 5)), 200, "application/json"),
        (json.dumps(result(["1", "2"], 1)), 200, "application/json"),
        (json.dumps(error(OUTAGE)), 200, "application/json"),
        (
            json.dumps(error("Search Backend failed: Database is not supported: pubmed")),
            200,
            "application/json",
        ),
        (
            "<eSearchResult>\n<ERROR>Search Backend failed: Unable to open connection to #PMQuerySrv</ERROR>",
            200,
            "text/xml",
        ),
    ],
)
async def test_what_is_no_result_is_an_outage_and_costs_one_request(
    ncbi: FakeNcbi, body: str, status: int, content_type: str
) -> None:
    await unavailable(ncbi, always(body, status, content_type))
    assert len(ncbi.received) == 1


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"error": "API key invalid", "api-key": KEY, "type": "invalid", "status": "unknown"}, 400),
        (error("Invalid db name specified: pubmedd"), 200),
        ("not found", 404),
        ("unauthorized", 401),
    ],
)
async def test_a_wrong_set_up_is_told_from_an_outage(ncbi: FakeNcbi, body: Any, status: int) -> None:
    caught = await unavailable(ncbi, always(body, status))
    assert isinstance(caught, EngineMisconfigured)
    assert KEY not in caught.reason


async def test_syntax_error_is_a_bad_query_once_a_canary_is_answered(ncbi: FakeNcbi) -> None:
    ncbi.respond = refuses(lambda form: "((" in form["term"])
    with pytest.raises(BadQuery, match="unexpected end of query"):
        await search(ncbi, "((aspirin")
    assert [form["term"] for form in ncbi.received] == ["((aspirin", "cancer", "((aspirin"]


async def test_a_query_cannot_pass_itself_off_as_an_outage(ncbi: FakeNcbi) -> None:
    term = "((couldn't resolve #pmquerysrv, the address table is empty"
    ncbi.respond = refuses(lambda form: "((" in form["term"], f"Search Backend failed: cannot parse {term}")
    with pytest.raises(BadQuery):
        await search(ncbi, term)


async def test_http_400_without_explanation_is_settled_by_the_canary(ncbi: FakeNcbi) -> None:
    ncbi.respond = lambda form: web.Response(status=400) if "((" in form["term"] else good(form)
    with pytest.raises(BadQuery):
        await search(ncbi, "((aspirin")
    await unavailable(ncbi, always("", 400))


async def test_query_too_long_for_the_service(ncbi: FakeNcbi) -> None:
    ncbi.respond = always("<html>", 414, "text/html")
    with pytest.raises(BadQuery):
        await search(ncbi)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("", None),
        ("soon", None),
        ("nan", None),
        ("3", 3.0),
        ("0", 0.5),
        ("-5", 0.5),
        ("99999", 60.0),
        ("1e999", 60.0),
        ("Mon, 23 Nov 2026 12:00:10 GMT", 10.0),
        ("Mon, 23 Nov 2026 11:00:00 GMT", 0.5),
    ],
)
def test_retry_after_forms(value: str | None, seconds: float | None) -> None:
    now = datetime(2026, 11, 23, 12, 0, 0, tzinfo=UTC)
    assert retry_after_seconds(value, now) == seconds


@given(status=st.sampled_from([200, 302, 400, 404, 414, 429, 500]), body=st.binary(max_size=200), retry=st.text())
def test_any_answer_whatever_gets_a_verdict(status: int, body: bytes, retry: str) -> None:
    for form in (
        body,
        json.dumps({"esearchresult": body.hex()}).encode(),
        b'{"esearchresult":' + body + b"}",
    ):
        try:
            found = read_reply(status, {"Retry-After": retry}, form, SearchRequest("a", retmax=5))
        except (BadQuery, EngineUnavailable, Undecided):
            continue
        assert len(found.ids) == min(5, found.count)


def recorded(folder: str) -> list[Path]:
    return sorted((Path(DATA or ".") / "fixtures_pubmed" / "biomcp_testdata").glob(folder))


@needs_data
async def test_recorded_results_replay(ncbi: FakeNcbi) -> None:
    seen = 0
    for path in [*recorded("pubmed_esearch_*.json"), *recorded("variant_articles_*_pubmed_*.json")]:
        body = path.read_text()
        ncbi.respond = always(body)
        answer = json.loads(body).get("esearchresult")
        if answer is None:
            assert (await unavailable(ncbi)).reason == "rate limit exceeded"
            continue
        found = await search(ncbi, retmax=int(answer.get("retmax", 20)))
        assert (list(found.ids), str(found.count)) == (answer["idlist"], answer["count"])
        seen += 1
    assert seen >= 4


@needs_data
async def test_recorded_xml_and_html_answers_are_never_a_bad_query(ncbi: FakeNcbi) -> None:
    folder = Path(DATA or ".") / "fixtures_pubmed" / "biopython_Tests_Entrez"
    paths = [*folder.glob("esearch*.xml"), *folder.glob("*.html")]
    assert len(paths) >= 7
    for path in paths:
        await unavailable(ncbi, always(path.read_text(), 200, "text/xml"))


@needs_data
async def test_quoted_errors_of_the_service_are_never_a_bad_query(ncbi: FakeNcbi) -> None:
    quoted = json.loads((Path(DATA or ".") / "fixtures_errors" / "error_bodies.json").read_text())
    ours = [entry for entry in quoted if entry["service"] == "pubmed-eutils"]
    assert len(ours) == 6
    for entry in ours:
        body = entry["body"] or ""
        if "esearchresult.ERROR" in entry["content_type"]:
            body = json.dumps(error(body.replace("\\n", "\n")))
        await unavailable(ncbi, always(body, entry["http_status"] or 200, "text/plain"))
