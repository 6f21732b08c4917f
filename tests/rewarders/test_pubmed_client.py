"""What the PubMed client sends."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from rewarders.engines.api_keys import without_key
from rewarders.engines.base import BadQuery, EngineUnavailable, SearchRequest, SearchResult
from rewarders.engines.pubmed import PubMedSettings
from tests.rewarders.fake_ncbi import KEY, SYNTAX, FakeNcbi, error, good, result
from tests.rewarders.fake_upstream import always, search


async def test_one_post_carries_everything_form_encoded(ncbi: FakeNcbi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", KEY)
    term = "a&retmax=0&api_key=x#frag +100% (é OR \U0001f9ec) ; db=gene"
    options = {"api_key_env": "TEST_KEY", "tool": "tool", "email": "a@b.org"}
    async with ncbi.engine(**options) as engine:
        found = await engine.search(SearchRequest(term, retmax=2, sort="relevance", max_date="2020/05/01"))
    assert found == SearchResult(ids=("11", "12"), count=3)
    assert ncbi.received == [
        {
            "db": "pubmed",
            "term": term,
            "retmode": "json",
            "retmax": "2",
            "sort": "relevance",
            "tool": "tool",
            "email": "a@b.org",
            "api_key": KEY,
            "datetype": "pdat",
            "mindate": "1800/01/01",
            "maxdate": "2020/05/01",
        }
    ]


@pytest.mark.parametrize("value", [None, "", "  "])
async def test_missing_or_blank_key_is_not_sent(
    ncbi: FakeNcbi, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.delenv("TEST_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("TEST_KEY", value)
    await search(ncbi, api_key_env="TEST_KEY")
    assert "api_key" not in ncbi.received[0]
    assert "mindate" not in ncbi.received[0]


async def test_ids_beyond_the_9999_of_pubmed_are_not_asked_for(ncbi: FakeNcbi) -> None:
    every = [str(number) for number in range(9999)]
    ncbi.respond = always(result(every, 40_362))
    assert len((await search(ncbi, retmax=20_000)).ids) == 9999
    assert ncbi.received[0]["retmax"] == "9999"


async def test_translation_and_warnings_are_kept(ncbi: FakeNcbi) -> None:
    ncbi.respond = always(
        result(
            ["1"],
            querytranslation='"a"[All Fields]',
            errorlist={"phrasesnotfound": ["zzqx"], "fieldsnotfound": []},
            warninglist={"outputmessages": ["No items found."]},
        )
    )
    found = await search(ncbi)
    assert found.translation == '"a"[All Fields]'
    assert found.warnings == ("phrasesnotfound: zzqx", "outputmessages: No items found.")


async def test_raw_control_characters_in_an_answer_are_read_over(ncbi: FakeNcbi) -> None:
    body = json.dumps(result(["1"], querytranslation="a?b")).replace("?", "\x01")
    ncbi.respond = always(body)
    assert await search(ncbi) == SearchResult(ids=("1",), count=1, translation="a\x01b")


async def test_no_hits_is_a_result(ncbi: FakeNcbi) -> None:
    ncbi.respond = always(result([]))
    assert await search(ncbi) == SearchResult(ids=(), count=0)


async def test_key_reaches_no_log_message_or_repr(
    ncbi: FakeNcbi, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TEST_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    texts: list[str] = []
    refusal = {"error": "API key invalid", "api-key": KEY}
    for respond in (always(refusal, 400), always("<html>", 500), always(refusal, 200), good):
        ncbi.respond = respond
        async with ncbi.engine(api_key_env="TEST_KEY") as engine:
            try:
                texts.append(repr(await engine.search(SearchRequest("a", retmax=3))))
            except EngineUnavailable as caught:
                texts += [repr(caught), str(caught)]
            texts += [repr(engine), repr(vars(engine))]
    assert all(form["api_key"] == KEY for form in ncbi.received)
    assert KEY not in "".join([*texts, caplog.text])


async def test_a_key_that_the_service_quotes_leaves_the_client_in_no_text(
    ncbi: FakeNcbi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_KEY", KEY)
    quoting = {**result(["1"])["esearchresult"], "querytranslation": KEY, "warninglist": {"outputmessages": [KEY]}}
    ncbi.respond = always({"esearchresult": quoting})
    found = await search(ncbi, api_key_env="TEST_KEY")
    assert (found.ids, found.translation) == (("1",), "<API key>")
    ncbi.respond = lambda form: always(error(f"{SYNTAX} of {KEY}") if form["term"] != "cancer" else result(["1"]))(form)
    with pytest.raises(BadQuery, match=r"of <API key>$") as refused:
        await search(ncbi, api_key_env="TEST_KEY")
    assert KEY not in repr([found, refused.value])


@pytest.mark.parametrize("key", ["a", "esearch", "12345678"])
def test_what_may_be_part_of_an_answer_is_not_taken_for_a_key(key: str) -> None:
    body = b'{"esearchresult":{"idlist":["12345678"]}}'
    assert without_key(body, key) == body


@pytest.mark.parametrize(
    "options", [{"term": "  "}, {"retmax": 0}, {"max_date": "yesterday"}, {"min_date": "2020-01-01"}]
)
def test_requests_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"query|retmax|date"):
        SearchRequest(**{"term": "a", "retmax": 1, **options})


def test_equal_searches_are_equal() -> None:
    assert SearchRequest(" a \n AND b", retmax=1) == SearchRequest("a AND b", retmax=1)
    assert hash(SearchRequest("a", retmax=1)) != hash(SearchRequest("a", retmax=2))


def test_address_without_scheme_is_refused() -> None:
    with pytest.raises(ValueError, match="http"):
        PubMedSettings(base_url="localhost:8000")


@pytest.mark.parametrize(
    ("base_url", "url"),
    [
        ("https://eutils.ncbi.nlm.nih.gov", "https://eutils.ncbi.nlm.nih.gov/entrez/eutils/esearch.fcgi"),
        ("http://127.0.0.1:80/", "http://127.0.0.1:80/entrez/eutils/esearch.fcgi"),
        ("http://host/mirror/", "http://host/mirror/esearch.fcgi"),
    ],
)
def test_address_is_a_host_or_a_folder(base_url: str, url: str) -> None:
    assert PubMedSettings(base_url=base_url).esearch_url == url
