"""A real HTTP server in the place of a search service, and its client: what does not depend on the service."""

from __future__ import annotations

import asyncio
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import pytest
from aiohttp import web

from rewarders.engines.base import EngineUnavailable, SearchRequest, SearchResult
from rewarders.engines.http import HttpEngine
from rewarders.engines.permits import Permit, unlimited

Parameters = dict[str, str]
Responder = Callable[[Parameters], Awaitable[web.StreamResponse] | web.StreamResponse]
RawHandler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class FakeUpstream(ABC):
    """Answers with `respond`; keeps the parameters of every search, its User-Agent, and which connection carried it."""

    respond: Responder
    received: list[Parameters] = field(default_factory=list)
    agents: list[str] = field(default_factory=list)
    connections: set[int] = field(default_factory=set)
    url: str = ""

    term: ClassVar[str]  # the parameter that holds the query
    sort: ClassVar[str]  # an order the service has

    @abstractmethod
    def routes(self) -> Sequence[web.AbstractRouteDef]:
        """What is served."""

    @abstractmethod
    def good(self, parameters: Parameters) -> web.Response:
        """A proper answer with three documents at most."""

    @abstractmethod
    def unexplained(self) -> web.Response:
        """A refusal that does not say whose fault it is."""

    @abstractmethod
    def engine(self, *, permit: Permit = unlimited, **options: Any) -> HttpEngine:
        """A client of this server, not yet started."""

    @property
    def terms(self) -> list[str]:
        """The queries, in order of arrival."""
        return [parameters[self.term] for parameters in self.received]

    async def answer(self, request: web.Request, parameters: Parameters) -> web.StreamResponse:
        """Note a search and answer it."""
        self.received.append(parameters)
        self.agents.append(request.headers["User-Agent"])
        self.connections.add(id(request.transport))
        return await awaited(self.respond(dict(parameters)))

    def refuse(self, bad: Callable[[str], bool]) -> None:
        """From now on, refuse the queries that are `bad` without saying why."""
        self.respond = lambda parameters: self.unexplained() if bad(parameters[self.term]) else self.good(parameters)


FakeT = TypeVar("FakeT", bound=FakeUpstream)


@asynccontextmanager
async def running(fake: FakeT) -> AsyncIterator[FakeT]:
    app = web.Application()
    app.add_routes(fake.routes())
    runner = web.AppRunner(app, shutdown_timeout=0.1, max_line_size=1 << 20)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield fake
    finally:
        await runner.cleanup()


@asynccontextmanager
async def raw_server(handle: RawHandler) -> AsyncIterator[str]:
    """A server that is not bound to HTTP; gives its address."""
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


async def awaited(response: Awaitable[web.StreamResponse] | web.StreamResponse) -> web.StreamResponse:
    return await response if isinstance(response, Awaitable) else response


async def search(fake: FakeUpstream, term: str = "aspirin", retmax: int = 100, **options: Any) -> SearchResult:
    async with fake.engine(**options) as engine:
        return await engine.search(SearchRequest(term, retmax=retmax, sort=fake.sort))


async def unavailable(fake: FakeUpstream, respond: Responder | None = None, **options: Any) -> EngineUnavailable:
    if respond is not None:
        fake.respond = respond
    with pytest.raises(EngineUnavailable) as caught:
        await search(fake, **options)
    return caught.value


def always(body: Any, status: int = 200, content_type: str = "application/json", **headers: str) -> Responder:
    text = body if isinstance(body, str) else json.dumps(body)
    return lambda _: web.Response(text=text, status=status, content_type=content_type, headers=headers)
