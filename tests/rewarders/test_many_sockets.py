"""Thousands of requests in flight from one process, each on a connection of its own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import pytest

from rewarders.engines.base import SearchRequest
from rewarders.engines.pubmed import PubMedEngine, PubMedSettings
from tests.rewarders.fake_ncbi import result

resource = pytest.importorskip("resource")
SEARCHES = 2000
WITHIN_S = 60.0


@pytest.fixture(autouse=True)
def enough_open_files() -> Iterator[None]:
    """Both ends of every connection are in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * SEARCHES + 500
    if hard != resource.RLIM_INFINITY and hard < needed:
        pytest.skip(f"this machine allows {hard} open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class SlowService:
    """Answers nobody before all are there: the slowest server that still answers everybody."""

    def __init__(self) -> None:
        self.arrived = 0
        self._all_there = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            await reader.readexactly(length)
            self.arrived += 1
            if self.arrived == SEARCHES:
                self._all_there.set()
            await self._all_there.wait()
            body = json.dumps(result(["7"])).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body))
            writer.write(body)
            await writer.drain()
        finally:
            writer.close()


async def test_thousands_of_searches_are_in_flight_at_once_and_all_are_answered() -> None:
    service = SlowService()
    server = await asyncio.start_server(service.serve, "127.0.0.1", 0, backlog=SEARCHES)
    port = server.sockets[0].getsockname()[1]
    settings = PubMedSettings(
        base_url=f"http://127.0.0.1:{port}", api_key_env=None, timeout_s=WITHIN_S, connect_timeout_s=WITHIN_S
    )
    try:
        async with asyncio.timeout(WITHIN_S), PubMedEngine(settings) as engine:
            searches = (engine.search(SearchRequest(f"word{number}", retmax=1)) for number in range(SEARCHES))
            found = await asyncio.gather(*searches)
    finally:
        server.close()
    assert [hits.ids for hits in found] == [("7",)] * SEARCHES
