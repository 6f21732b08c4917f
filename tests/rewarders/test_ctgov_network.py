"""What the ClinicalTrials.gov client makes of a broken network, and how it uses connections and permits."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from rewarders.engines.base import BadQuery, EngineUnavailable, SearchRequest
from rewarders.engines.ctgov import CtGovEngine
from rewarders.engines.permits import Slot
from tests.rewarders.ctgov.fake_ctgov import (
    FakeCtGov,
    Query,
    always,
    good,
    paged,
    refuses,
    running_ctgov,
    settings,
    trials,
    unavailable,
)


@pytest.fixture
async def ctgov() -> AsyncIterator[FakeCtGov]:
    async with running_ctgov() as fake:
        yield fake


async def test_connection_is_kept_alive(ctgov: FakeCtGov) -> None:
    async with CtGovEngine(settings(ctgov)) as engine:
        for number in range(5):
            await engine.search(SearchRequest(f"q{number}", retmax=3))
    assert len(ctgov.queries) == 5
    assert len(ctgov.connections) == 1


async def test_connections_are_limited_and_nobody_waits_for_one_with_a_permit(ctgov: FakeCtGov) -> None:
    in_flight = most = permits = most_permits = 0

    async def slow(query: Query) -> web.StreamResponse:
        nonlocal in_flight, most
        in_flight += 1
        most = max(most, in_flight)
        await asyncio.sleep(0.02)
        in_flight -= 1
        return good(query)  # type: ignore[return-value]

    class Counter:
        def sent(self) -> None: ...

        def replied(self, limit: int | None = None, remaining: int | None = None) -> None:
            pass

    @asynccontextmanager
    async def permit() -> AsyncIterator[Slot]:
        nonlocal permits, most_permits
        permits += 1
        most_permits = max(most_permits, permits)
        yield Counter()
        permits -= 1

    ctgov.respond = slow
    async with CtGovEngine(settings(ctgov, max_connections=3), permit=permit) as engine:
        await asyncio.gather(*(engine.search(SearchRequest(f"q{n}", retmax=3)) for n in range(20)))
    assert (most, most_permits) == (3, 3)


async def test_every_page_takes_a_permit_of_its_own(ctgov: FakeCtGov) -> None:
    events: list[str] = []

    class Recorder:
        def sent(self) -> None: ...

        def replied(self, limit: int | None = None, remaining: int | None = None) -> None:
            events.append("replied")

    @asynccontextmanager
    async def permit() -> AsyncIterator[Slot]:
        events.append(f"granted before request {len(ctgov.queries) + 1}")
        yield Recorder()
        events.append("released")

    ctgov.respond = paged(trials(1, 25))
    async with CtGovEngine(settings(ctgov, page_size=10), permit=permit) as engine:
        await engine.search(SearchRequest("a", retmax=30))
        assert engine.requests_sent == 3
    expected = [[f"granted before request {number}", "replied", "released"] for number in (1, 2, 3)]
    assert events == [event for group in expected for event in group]


async def test_waiting_for_a_permit_does_not_use_up_the_deadline(ctgov: FakeCtGov) -> None:
    class Silent:
        def sent(self) -> None: ...

        def replied(self, limit: int | None = None, remaining: int | None = None) -> None:
            pass

    @asynccontextmanager
    async def slow_permit() -> AsyncIterator[Slot]:
        await asyncio.sleep(0.6)
        yield Silent()

    async with CtGovEngine(settings(ctgov, timeout_s=0.3), permit=slow_permit) as engine:
        assert (await engine.search(SearchRequest("a", retmax=3))).count == 3


async def test_hang_ends_at_the_deadline(ctgov: FakeCtGov) -> None:
    async def hang(query: Query) -> web.StreamResponse:
        await asyncio.sleep(30)
        return good(query)  # type: ignore[return-value]

    started = time.monotonic()
    caught = await unavailable(ctgov, hang, timeout_s=0.3)
    assert "0.3 s" in caught.reason
    assert time.monotonic() - started < 2.0


async def test_broken_connections_are_outages(ctgov: FakeCtGov) -> None:
    async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        writer.transport.abort()

    async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"studies"')
        writer.close()

    async def stall(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"studies"')
        await writer.drain()
        await asyncio.sleep(5)

    for handler, reason in ((reset, "network error"), (cut, "network error"), (stall, "0.3 s")):
        async with _raw_server(handler) as url:
            ctgov.url = url
            assert reason in (await unavailable(ctgov, timeout_s=0.3)).reason


async def test_a_broken_connection_is_not_sent_on_again_unseen(ctgov: FakeCtGov) -> None:
    """aiohttp repeats a GET by itself if a connection breaks, kept alive or new: no permit would cover that one."""
    body = b'{"studies": [], "totalCount": 0}'
    arrived = 0

    async def answer_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal arrived
        for answered in (True, False):
            await reader.readuntil(b"\r\n\r\n")
            arrived += 1
            if answered:
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))

    async with _raw_server(answer_once) as url:
        ctgov.url = url
        async with CtGovEngine(settings(ctgov)) as engine:
            await engine.search(SearchRequest("a", retmax=1))
            with pytest.raises(EngineUnavailable, match="network error"):
                await engine.search(SearchRequest("b", retmax=1))
            assert arrived == engine.requests_sent == 2


@asynccontextmanager
async def _raw_server(
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


async def test_endless_answer_is_cut_off(ctgov: FakeCtGov) -> None:
    caught = await unavailable(ctgov, always("x" * 200_000), max_body_bytes=100_000)
    assert "longer than" in caught.reason


async def test_closed_client_is_unavailable(ctgov: FakeCtGov) -> None:
    engine = CtGovEngine(settings(ctgov))
    with pytest.raises(EngineUnavailable, match="closed"):
        await engine.search(SearchRequest("a", retmax=1))


async def test_closing_ends_running_searches(ctgov: FakeCtGov) -> None:
    async def hang(query: Query) -> web.StreamResponse:
        await asyncio.sleep(30)
        return good(query)  # type: ignore[return-value]

    ctgov.respond = hang
    engine = CtGovEngine(settings(ctgov, max_connections=1))
    await engine.start()
    running = [asyncio.create_task(engine.search(SearchRequest(f"q{n}", retmax=1))) for n in range(3)]
    while not ctgov.queries:
        await asyncio.sleep(0.01)
    await engine.close()
    ended = await asyncio.wait_for(asyncio.gather(*running, return_exceptions=True), timeout=5)
    assert [error for error in ended if not isinstance(error, EngineUnavailable)] == []


async def test_refused_queries_of_a_group_share_canaries(ctgov: FakeCtGov) -> None:
    ctgov.respond = refuses(lambda query: "(" in query["query.term"], "something new")

    async def ask(engine: CtGovEngine, number: int) -> None:
        with pytest.raises(BadQuery, match="something new"):
            await engine.search(SearchRequest(f"(q{number}", retmax=1))

    async with CtGovEngine(settings(ctgov)) as engine:
        await asyncio.gather(*(ask(engine, number) for number in range(8)))
    # One, and another for those refused after the first had left.
    assert 1 <= sum(query["query.term"] == "cancer" for query in ctgov.queries) < 8
