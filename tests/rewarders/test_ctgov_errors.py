"""Whose fault an answer of ClinicalTrials.gov is: the query's, an outage's, or ours."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from rewarders.engines.base import BadQuery, EngineMisconfigured, EngineUnavailable, SearchRequest
from rewarders.engines.ctgov_reply import Page, one_line, read_page
from rewarders.engines.verdicts import Undecided
from tests.rewarders.ctgov.fake_ctgov import SYNTAX, FakeCtGov, page, refuses, trials
from tests.rewarders.fake_upstream import Parameters, always, search, unavailable

DATA = os.environ.get("DEEPRETRIEVAL_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="set DEEPRETRIEVAL_DATA to replay recorded answers")

# As quoted from the live service in public issues and tests of other clients.
QUERY_REFUSALS = [
    SYNTAX,
    "Error parsing query in Other terms: inner bool query clause cannot be null",
    "Error parsing query in Other terms: no viable alternative at input 'a ['\nmismatched input '[' expecting {'('}",
    "Error parsing query in Other terms: extraneous input ')' expecting <EOF>",
    "Error parsing query in Other terms: token recognition error at: '\"unterminated'",
    "Error parsing query in Other terms: Unknown area name: `X`",
    "Error parsing query in Other terms: RANGE is not supported for multiple (57) fields",
    "Error parsing query in Other terms: Too complicated query",
    "Error parsing query in Other terms:\nAllowed values for enum field `x` are `A`",
    "Too complicated query",
]
OUR_REFUSALS = [
    "`filter.studyType` is unknown parameter",
    "`query.badfield` is unknown parameter",
    "Parameter 'fields' contains invalid field name: 'StudyDesign'",
    "Error parsing query in advanced filter: Unknown area name: `NotARealField`",
    "Item 1 in parameter `sort` has incorrect format",
    "Parameter `filter.geo` has incorrect format",
    "Parameter `sort` must contain no more than 2 items",
    "Invalid value in parameter `overallStatus`: `BOGUS`",
    "Invalid prefix in parameter name: query.cond",
    "Unknown sort field",
    "Unsupported sort field type: text",
]


# The query's fault.


@pytest.mark.parametrize("text", QUERY_REFUSALS)
async def test_a_refusal_that_names_the_query_is_a_bad_query_for_one_request(ctgov: FakeCtGov, text: str) -> None:
    ctgov.respond = always(text, 400, "text/plain")
    with pytest.raises(BadQuery) as caught:
        await search(ctgov)
    assert len(ctgov.received) == 1
    assert "\n" not in caught.value.reason
    assert len(caught.value.reason) <= 200


@pytest.mark.parametrize("status", [413, 414, 431])
async def test_a_query_too_long_is_a_bad_query(ctgov: FakeCtGov, status: int) -> None:
    ctgov.respond = always("<html>414 Request-URI Too Large</html>", status, "text/html")
    with pytest.raises(BadQuery, match="too long"):
        await search(ctgov)


async def test_an_unexplained_refusal_is_settled_by_a_canary(ctgov: FakeCtGov) -> None:
    ctgov.respond = refuses(lambda query: "((" in query["query.term"], "Something else went wrong")
    with pytest.raises(BadQuery, match="Something else went wrong"):
        await search(ctgov, "((aspirin")
    assert [query["query.term"] for query in ctgov.received] == ["((aspirin", "cancer", "((aspirin"]


async def test_unexplained_refusal_of_everything_is_an_outage(ctgov: FakeCtGov) -> None:
    for body, kind in (
        ("Something else went wrong", "text/plain"),
        ("<html>Bad Request</html>", "text/html"),
        ("", ""),
    ):
        caught = await unavailable(ctgov, always(body, 400, kind))
        assert "canary" in caught.reason


# Ours.


@pytest.mark.parametrize("text", OUR_REFUSALS)
async def test_a_refusal_of_what_we_sent_is_our_fault(ctgov: FakeCtGov, text: str) -> None:
    caught = await unavailable(ctgov, always(text, 400, "text/plain"))
    assert isinstance(caught, EngineMisconfigured)
    assert len(ctgov.received) == 1


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (401, "unauthorized"),
        (404, "NCT number NCT99999999 not found"),
        (405, "Method Not Allowed"),
        (406, ""),
        (410, "<html>"),
        (415, ""),
    ],
)
async def test_other_refusals_are_our_fault(ctgov: FakeCtGov, status: int, body: str) -> None:
    caught = await unavailable(ctgov, always(body, status, "text/plain"))
    assert isinstance(caught, EngineMisconfigured)


# Outages.


@pytest.mark.parametrize(
    ("body", "status", "content_type"),
    [
        ("<html>down for maintenance</html>", 200, "text/html"),
        ("\ufeff <!DOCTYPE html><html>", 200, "application/json"),
        ("<html>Bad Gateway</html>", 502, "text/html"),
        ("", 500, "text/plain"),
        ("slow", 408, "text/plain"),
        ("<html>404 Not Found<hr>nginx</html>", 404, "text/html"),
        ("Forbidden", 403, "text/plain"),
        ("", 200, "application/json"),
        ("   ", 200, "application/json"),
        (json.dumps(page(trials(1, 5), 5))[:-20], 200, "application/json"),
        ("Error parsing query in Other terms: no", 200, "text/plain"),
        ("[]", 200, "application/json"),
        ("null", 200, "application/json"),
        ("{}", 200, "application/json"),
        ('{"studies": {}}', 200, "application/json"),
        ('{"studies": [{}], "totalCount": 1}', 200, "application/json"),
        ('{"studies": [], "totalCount": "0"}', 200, "application/json"),
        ('{"studies": [], "totalCount": true}', 200, "application/json"),
        ('{"studies": [], "totalCount": -1}', 200, "application/json"),
        ('{"studies": [], "totalCount": 0, "nextPageToken": 5}', 200, "application/json"),
        (json.dumps(page([""], 1)), 200, "application/json"),
        (
            json.dumps({**page([], 1), "studies": [{"protocolSection": {"identificationModule": {"nctId": 7}}}]}),
            200,
            "x/y",
        ),
        ("[" * 100_000, 200, "application/json"),
    ],
)
async def test_what_is_no_result_is_an_outage_and_costs_one_request(
    ctgov: FakeCtGov, body: str, status: int, content_type: str
) -> None:
    caught = await unavailable(ctgov, always(body, status, content_type))
    assert not isinstance(caught, EngineMisconfigured)
    assert "\n" not in caught.reason
    assert len(ctgov.received) == 1


async def test_bytes_that_are_no_text_are_an_outage(ctgov: FakeCtGov) -> None:
    body = b'{"studies": [{"protocolSection": {"identificationModule": {"nctId": "\xff"}}}], "totalCount": 1}'
    caught = await unavailable(ctgov, lambda _: web.Response(body=body, content_type="application/json"))
    assert "not JSON" in caught.reason


async def test_rate_limits_and_retry_after(ctgov: FakeCtGov) -> None:
    assert (await unavailable(ctgov, always("Too Many Requests", 429, "text/plain"))).retry_after_s == 10.0
    for status, body in ((429, "slow down"), (503, "<html>"), (403, "<html>"), (404, "<html>")):
        caught = await unavailable(ctgov, always(body, status, "text/html", **{"Retry-After": "7"}))
        assert caught.retry_after_s == 7.0
    assert (await unavailable(ctgov, always("<html>", 503, "text/html"))).retry_after_s is None


async def test_a_closed_door_is_not_knocked_at_again_at_once(ctgov: FakeCtGov) -> None:
    caught = await unavailable(ctgov, always("<html>Forbidden</html>", 403, "text/html"))
    assert caught.retry_after_s == 60.0
    assert "User-Agent" in caught.reason


async def test_a_page_token_that_is_refused_is_an_outage(ctgov: FakeCtGov) -> None:
    def respond(query: Parameters) -> web.Response:
        if "pageToken" in query:
            return web.Response(status=400, text="Parameter `pageToken` has incorrect format")
        return web.json_response(page(trials(1, 2), 5, "a"))

    caught = await unavailable(ctgov, respond)
    assert not isinstance(caught, EngineMisconfigured)
    assert "token" in caught.reason


# Properties.


@given(query=st.text(max_size=60))
def test_no_query_is_refused_in_the_words_of_another_verdict(query: str) -> None:
    """Whatever a refusal quotes of the query, the verdict stays the query's fault."""
    for sign in (*OUR_REFUSALS, "Parameter `pageToken`", "<html>", "\n"):
        body = f"Error parsing query in Other terms: no viable alternative at input '{sign} {query}'"
        with pytest.raises(BadQuery) as caught:
            read_page(400, {}, body.encode("utf-8", "replace"))
        assert caught.value.reason.isprintable()


@given(body=st.binary(max_size=200), status=st.sampled_from([200, 302, 400, 403, 404, 414, 429, 500, 503]))
def test_any_answer_has_a_verdict(body: bytes, status: int) -> None:
    try:
        found: Page | Exception = read_page(status, {}, body)
    except (BadQuery, EngineUnavailable, Undecided) as verdict:
        found = verdict
    assert isinstance(found, Page) or str(found).isprintable()


def test_a_refusal_is_shortened_to_one_line() -> None:
    assert one_line("mismatched input '[' expecting {<EOF>, '('}") == "mismatched input '['"
    assert one_line("a\n\x00 b\u2028c") == "a b c"
    assert len(one_line("x" * 5000)) == 200


@needs_data
@pytest.mark.parametrize("number", range(6))
async def test_recorded_refusals_get_their_verdict(ctgov: FakeCtGov, number: int) -> None:
    entries = json.loads((Path(str(DATA)) / "fixtures_errors" / "error_bodies.json").read_text())
    recorded = [entry for entry in entries if entry["service"] == "clinicaltrials.gov-v2"]
    assert len(recorded) == 6
    entry = recorded[number]
    ctgov.respond = always(entry["body"], entry["http_status"], entry["content_type"])
    async with ctgov.engine() as engine:
        expected = BadQuery if "in Other terms" in entry["body"] else EngineMisconfigured
        with pytest.raises(expected):
            await engine.search(SearchRequest("a", retmax=1, sort="relevance"))
