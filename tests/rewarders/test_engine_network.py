"""What every client behind HTTP makes of a broken network, of permits and of refusals that do not say why."""

from __future__ import annotations

import asyncio
import gzip
import logging
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from rewarders.engines.base import BadQuery, EngineMisconfigured, EngineUnavailable, SearchRequest
from rewarders.engines.http import HttpEngine
from rewarders.engines.permits import Slot
from tests.rewarders.fake_upstream import (
    FakeUpstream,
    Parameters,
    RawHandler,
    Responder,
    always,
    raw_server,
    search,
    unavailable,
)
from tests.rewarders.recording_permit import Recorder, recording, requests_under_permits

PART_OF_AN_ANSWER = b'HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"studies"'


def ask(fake: FakeUpstream, term: str = "aspirin") -> SearchRequest:
    return SearchRequest(term, retmax=3, sort=fake.sort)


async def hang(_: Parameters) -> web.StreamResponse:
    await asyncio.sleep(30)
    return web.Response()


# Connections.


async def test_connection_is_kept_alive(upstream: FakeUpstream) -> None:
    async with upstream.engine() as engine:
        for number in range(5):
            await engine.search(ask(upstream, f"q{number}"))
    assert len(upstream.received) == 5
    assert len(upstream.connections) == 1


async def test_connections_are_limited_and_nobody_waits_for_one_with_a_permit(upstream: FakeUpstream) -> None:
    in_flight = most = permits = most_permits = 0

    async def slow(parameters: Parameters) -> web.StreamResponse:
        nonlocal in_flight, most
        in_flight += 1
        most = max(most, in_flight)
        await asyncio.sleep(0.02)
        in_flight -= 1
        return upstream.good(parameters)

    @asynccontextmanager
    async def permit() -> AsyncIterator[Slot]:
        nonlocal permits, most_permits
        permits += 1
        most_permits = max(most_permits, permits)
        yield Recorder([])
        permits -= 1

    upstream.respond = slow
    async with upstream.engine(max_connections=3, permit=permit) as engine:
        await asyncio.gather(*(engine.search(ask(upstream, f"q{n}")) for n in range(20)))
    assert (most, most_permits) == (3, 3)


async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    writer.transport.abort()


async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    writer.write(PART_OF_AN_ANSWER)
    writer.close()


async def stall(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    writer.write(PART_OF_AN_ANSWER)
    await writer.drain()
    await asyncio.sleep(5)


async def read_request(reader: asyncio.StreamReader) -> None:
    await reader.readuntil(b"\r\n\r\n")


@pytest.mark.parametrize(("handler", "reason"), [(reset, "network error"), (cut, "network error"), (stall, "0.3 s")])
async def test_broken_connections_are_outages(upstream: FakeUpstream, handler: RawHandler, reason: str) -> None:
    async with raw_server(handler) as url:
        upstream.url = url
        timeout_s = 0.3 if handler is stall else 5.0
        assert reason in (await unavailable(upstream, timeout_s=timeout_s)).reason


async def test_hang_ends_at_the_deadline(upstream: FakeUpstream) -> None:
    started = time.monotonic()
    caught = await unavailable(upstream, hang, timeout_s=0.3)
    assert "0.3 s" in caught.reason
    assert time.monotonic() - started < 15, "half of what the answer takes"


async def test_a_broken_connection_is_not_sent_on_again_unseen(upstream: FakeUpstream) -> None:
    """aiohttp repeats a GET by itself if a connection breaks, kept alive or new: no permit would cover that one."""
    arrived = 0
    answer = upstream.good({"retmax": "3", "pageSize": "3"}).body

    async def answer_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal arrived
        for answered in (True, False):
            head = await reader.readuntil(b"\r\n\r\n")
            if head.startswith(b"POST"):
                await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split()[0]))
            arrived += 1
            if answered:
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(answer), answer))

    async with raw_server(answer_once) as url:
        upstream.url = url
        async with upstream.engine() as engine:
            await engine.search(ask(upstream, "a"))
            with pytest.raises(EngineUnavailable, match="network error"):
                await engine.search(ask(upstream, "b"))
            assert arrived == engine.requests_sent == 2


def plain(_: Parameters) -> web.Response:
    return web.Response(text="x" * 200_000)


def compressed(_: Parameters) -> web.Response:
    packed = gzip.compress(b"x" * 200_000)
    return web.Response(body=packed, headers={"Content-Encoding": "gzip"})


def of_unknown_length(_: Parameters) -> web.Response:
    response = plain(_)
    response.enable_chunked_encoding()
    return response


@pytest.mark.parametrize("respond", [plain, compressed, of_unknown_length])
async def test_endless_answer_is_cut_off(upstream: FakeUpstream, respond: Responder) -> None:
    caught = await unavailable(upstream, respond, max_body_bytes=100_000)
    assert "longer than" in caught.reason


async def test_redirects_are_not_followed(upstream: FakeUpstream) -> None:
    for status in (301, 302, 303, 307, 308):
        caught = await unavailable(upstream, always("", status, Location="/elsewhere"))
        assert isinstance(caught, EngineMisconfigured)
    assert len(upstream.received) == 5


async def test_nobody_listening_is_an_outage_that_names_the_address(upstream: FakeUpstream) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        upstream.url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    async with upstream.engine() as engine:
        with pytest.raises(EngineUnavailable, match=r"127\.0\.0\.1.*network error"):
            await engine.check()


async def test_check_passes_on_a_working_service_with_one_request(upstream: FakeUpstream) -> None:
    async with upstream.engine() as engine:
        await engine.check()
        assert engine.requests_sent == 1


# Closing.


async def test_closed_client_is_unavailable(upstream: FakeUpstream) -> None:
    engine = upstream.engine()
    with pytest.raises(EngineUnavailable, match="closed"):
        await engine.search(ask(upstream))


async def test_closing_ends_running_searches(upstream: FakeUpstream) -> None:
    upstream.respond = hang
    engine = upstream.engine(timeout_s=20.0)
    await engine.start()
    running = [asyncio.create_task(engine.search(ask(upstream, f"q{n}"))) for n in range(3)]
    while not upstream.received:
        await asyncio.sleep(0.01)
    await engine.close()
    ended = await asyncio.wait_for(asyncio.gather(*running, return_exceptions=True), timeout=15)
    assert [error for error in ended if not isinstance(error, EngineUnavailable)] == []


async def test_who_gets_a_permit_of_a_closed_client_sends_nothing(upstream: FakeUpstream) -> None:
    opened = asyncio.Event()

    @asynccontextmanager
    async def late() -> AsyncIterator[Slot]:
        await opened.wait()
        yield Recorder([])

    engine = upstream.engine(permit=late)
    await engine.start()
    waiting = asyncio.create_task(engine.search(ask(upstream)))
    await asyncio.sleep(0.01)
    await engine.close()
    opened.set()
    with pytest.raises(EngineUnavailable, match="closed"):
        await waiting
    assert (upstream.received, engine.requests_sent) == ([], 0)


# Permits.


async def test_permit_surrounds_every_request_and_hears_of_the_reply(upstream: FakeUpstream) -> None:
    events: list[str] = []
    upstream.refuse(lambda term: "((" in term)
    async with upstream.engine(permit=recording(upstream, events)) as engine:
        with pytest.raises(BadQuery):
            await engine.search(ask(upstream, "((a"))
        assert engine.requests_sent == 3
    assert events == requests_under_permits(3)


async def test_waiting_for_a_permit_does_not_use_up_the_deadline(upstream: FakeUpstream) -> None:
    @asynccontextmanager
    async def slow_permit() -> AsyncIterator[Slot]:
        await asyncio.sleep(1.5)
        yield Recorder([])

    async with upstream.engine(timeout_s=1.0, permit=slow_permit) as engine:
        assert (await engine.search(ask(upstream))).count == 3


# Refusals that do not say why.


async def test_a_refusal_is_a_bad_query_once_a_canary_is_answered(upstream: FakeUpstream) -> None:
    upstream.refuse(lambda term: "((" in term)
    with pytest.raises(BadQuery):
        await search(upstream, "((aspirin")
    assert upstream.terms == ["((aspirin", "cancer", "((aspirin"]


async def test_unexplained_refusal_of_everything_is_an_outage(upstream: FakeUpstream) -> None:
    upstream.refuse(lambda _: True)
    caught = await unavailable(upstream)
    assert "canary" in caught.reason
    assert len(upstream.received) == 2


async def test_an_outage_that_ends_between_query_and_canary_is_not_charged(upstream: FakeUpstream) -> None:
    upstream.refuse(lambda _: len(upstream.received) == 1)
    assert (await search(upstream)).count == 3


async def test_concurrent_refusals_share_canaries(upstream: FakeUpstream) -> None:
    async def respond(parameters: Parameters) -> web.StreamResponse:
        await asyncio.sleep(0.05)
        refused = "((" in parameters[upstream.term]
        return upstream.unexplained() if refused else upstream.good(parameters)

    async def refused(engine: HttpEngine, number: int) -> None:
        with pytest.raises(BadQuery):
            await engine.search(ask(upstream, f"((q{number}"))

    upstream.respond = respond
    async with upstream.engine() as engine:
        await asyncio.gather(*(refused(engine, number) for number in range(8)))
    # One, and another for those refused after the first had left.
    assert 1 <= upstream.terms.count("cancer") < 8


async def test_the_address_in_messages_holds_no_password(upstream: FakeUpstream) -> None:
    upstream.url = "https://user:secret@host"
    with pytest.raises(ValueError, match="must not hold") as caught:
        upstream.engine()
    assert "secret" not in str(caught.value)


async def test_no_query_reaches_a_log_or_message_when_the_network_fails(
    upstream: FakeUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with raw_server(reset) as url:
        upstream.url = url
        async with upstream.engine() as engine:
            with pytest.raises(EngineUnavailable) as caught:
                await engine.search(ask(upstream, "secretword"))
    assert "secretword" not in repr(caught.value) + caplog.text
