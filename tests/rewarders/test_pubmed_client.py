"""What the PubMed client sends, and what it makes of a broken network."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from rewarders.engines.base import (
    BadQuery,
    EngineUnavailable,
    SearchRequest,
    SearchResult,
)
from rewarders.engines.permits import Slot
from rewarders.engines.pubmed import PubMedEngine, PubMedSettings
from tests.rewarders.fake_ncbi import (
    KEY,
    FakeNcbi,
    Form,
    always,
    good,
    refuses,
    result,
    search,
    settings,
    unavailable,
)


async def test_one_post_carries_everything_form_encoded(ncbi: FakeNcbi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", KEY)
    term = "a&retmax=0&api_key=x#frag +100% (é OR \U0001f9ec) ; db=gene"
    options = settings(ncbi, api_key_env="TEST_KEY", tool="tool", email="a@b.org")
    async with PubMedEngine(options) as engine:
        found = await engine.search(SearchRequest(term, retmax=2, sort="relevance", max_date="2020/05/01"))
    assert found == SearchResult(ids=("11", "12"), count=3)
    assert ncbi.forms == [
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
    assert "api_key" not in ncbi.forms[0]
    assert "mindate" not in ncbi.forms[0]


async def test_ids_beyond_the_9999_of_pubmed_are_not_asked_for(ncbi: FakeNcbi) -> None:
    every = [str(number) for number in range(9999)]
    ncbi.respond = always(result(every, 40_362))
    assert len((await search(ncbi, retmax=20_000)).ids) == 9999
    assert ncbi.forms[0]["retmax"] == "9999"


async def test_connection_is_kept_alive(ncbi: FakeNcbi) -> None:
    async with PubMedEngine(settings(ncbi)) as engine:
        for number in range(5):
            await engine.search(SearchRequest(f"q{number}", retmax=3))
    assert len(ncbi.forms) == 5
    assert len(ncbi.connections) == 1


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


async def test_no_hits_is_a_result(ncbi: FakeNcbi) -> None:
    ncbi.respond = always(result([]))
    assert await search(ncbi) == SearchResult(ids=(), count=0)


async def test_hang_ends_at_the_deadline(ncbi: FakeNcbi) -> None:
    async def hang(form: Form) -> web.Response:
        await asyncio.sleep(30)
        return good(form)

    started = time.monotonic()
    caught = await unavailable(ncbi, hang, timeout_s=0.3)
    assert "0.3 s" in caught.reason
    assert time.monotonic() - started < 2.0


async def test_body_that_stops_coming_ends_at_the_deadline(ncbi: FakeNcbi) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"esearchresult"')
        await writer.drain()
        await asyncio.sleep(5)

    async with raw_server(handle) as url:
        ncbi.url = url
        assert "0.3 s" in (await unavailable(ncbi, timeout_s=0.3)).reason


async def test_connection_reset_or_body_cut_short_is_an_outage(ncbi: FakeNcbi) -> None:
    async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        writer.transport.abort()

    async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"esearchresult"')
        writer.close()

    for handler in (reset, cut):
        async with raw_server(handler) as url:
            ncbi.url = url
            assert "network error" in (await unavailable(ncbi)).reason


@asynccontextmanager
async def raw_server(
    handle: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[str]:
    tasks: set[asyncio.Task[None] | None] = set()

    async def tracked(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        try:
            await handle(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_server(tracked, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    finally:
        server.close()
        running = [task for task in tasks if task is not None]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def test_nobody_listening_is_an_outage_that_names_the_address(ncbi: FakeNcbi) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        ncbi.url = f"http://127.0.0.1:{unused.getsockname()[1]}/"
    async with PubMedEngine(settings(ncbi)) as engine:
        with pytest.raises(EngineUnavailable, match=r"127\.0\.0\.1.*network error"):
            await engine.check()


async def test_check_passes_on_a_working_service(ncbi: FakeNcbi) -> None:
    async with PubMedEngine(settings(ncbi)) as engine:
        await engine.check()
    assert len(ncbi.forms) == 1


async def test_endless_answer_is_cut_off(ncbi: FakeNcbi) -> None:
    caught = await unavailable(ncbi, always("x" * 200_000), max_body_bytes=100_000)
    assert "longer than" in caught.reason


async def test_closed_client_is_unavailable(ncbi: FakeNcbi) -> None:
    engine = PubMedEngine(settings(ncbi))
    with pytest.raises(EngineUnavailable, match="closed"):
        await engine.search(SearchRequest("a", retmax=1))


async def test_permit_surrounds_every_request_and_hears_of_the_reply(ncbi: FakeNcbi) -> None:
    events: list[str] = []

    class Recorder:
        def sent(self) -> None: ...

        def replied(self, limit: int | None = None, remaining: int | None = None) -> None:
            events.append("replied")

    @asynccontextmanager
    async def permit() -> AsyncIterator[Slot]:
        events.append(f"granted before request {len(ncbi.forms) + 1}")
        yield Recorder()
        events.append("released")

    ncbi.respond = refuses(lambda form: "((" in form["term"])
    async with PubMedEngine(settings(ncbi), permit=permit) as engine:
        with pytest.raises(BadQuery):
            await engine.search(SearchRequest("((", retmax=5))
        assert engine.requests_sent == 3
    expected = [[f"granted before request {number}", "replied", "released"] for number in (1, 2, 3)]
    assert events == [event for group in expected for event in group]


async def test_waiting_for_a_permit_does_not_use_up_the_deadline(ncbi: FakeNcbi) -> None:
    class Silent:
        def sent(self) -> None: ...

        def replied(self, limit: int | None = None, remaining: int | None = None) -> None:
            pass

    @asynccontextmanager
    async def slow_permit() -> AsyncIterator[Slot]:
        await asyncio.sleep(0.6)
        yield Silent()

    async with PubMedEngine(settings(ncbi, timeout_s=0.3), permit=slow_permit) as engine:
        assert (await engine.search(SearchRequest("a", retmax=3))).count == 3


async def test_key_reaches_no_log_message_or_repr(
    ncbi: FakeNcbi, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TEST_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    texts: list[str] = []
    refusal = {"error": "API key invalid", "api-key": KEY}
    for respond in (always(refusal, 400), always("<html>", 500), always(refusal, 200), good):
        ncbi.respond = respond
        async with PubMedEngine(settings(ncbi, api_key_env="TEST_KEY")) as engine:
            try:
                texts.append(repr(await engine.search(SearchRequest("a", retmax=3))))
            except EngineUnavailable as caught:
                texts += [repr(caught), str(caught)]
            texts += [repr(engine), repr(vars(engine))]
    assert all(form["api_key"] == KEY for form in ncbi.forms)
    assert KEY not in "".join([*texts, caplog.text])


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
