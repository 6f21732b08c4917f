"""A real HTTP server in the place of ClinicalTrials.gov, with answers as they have been seen from it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web

from rewarders.engines.base import EngineUnavailable, SearchRequest, SearchResult
from rewarders.engines.ctgov import CtGovEngine, CtGovSettings

VERSION = {"apiVersion": "2.0.5", "dataTimestamp": "2026-08-07T09:00:05"}
SYNTAX = "Error parsing query in Other terms: missing ')' at '<EOF>'"

Query = dict[str, str]
Responder = Callable[[Query], Awaitable[web.StreamResponse] | web.StreamResponse]


def trials(first: int, last: int) -> list[str]:
    return [f"NCT{number:08d}" for number in range(first, last + 1)]


def page(ids: list[str], total: int | None = None, token: str | None = None) -> dict[str, Any]:
    body: dict[str, Any] = {
        "studies": [{"protocolSection": {"identificationModule": {"nctId": trial}}} for trial in ids]
    }
    if total is not None:
        body["totalCount"] = total
    if token is not None:
        body["nextPageToken"] = token
    return body


def paged(ids: list[str]) -> Responder:
    """Serves a list as the service does: a full page names the next one, only the first one has the count."""

    def respond(query: Query) -> web.Response:
        start, size = int(query.get("pageToken", "0")), int(query["pageSize"])
        chosen = ids[start : start + size]
        token = str(start + size) if len(chosen) == size else None
        return web.json_response(page(chosen, len(ids) if start == 0 else None, token))

    return respond


good = paged(trials(1, 3))


@dataclass
class FakeCtGov:
    """Answers with `respond`; keeps every query it was sent, its headers, and which connection carried it."""

    respond: Responder = good
    versions: Responder = lambda _: web.json_response(VERSION)
    queries: list[Query] = field(default_factory=list)
    agents: list[str] = field(default_factory=list)
    connections: set[int] = field(default_factory=set)
    versions_asked: int = 0
    url: str = ""

    async def studies(self, request: web.Request) -> web.StreamResponse:
        assert len(request.query) == len(set(request.query)), "a parameter was sent twice"
        self.queries.append(dict(request.query))
        self.agents.append(request.headers["User-Agent"])
        self.connections.add(id(request.transport))
        return await _awaited(self.respond(dict(request.query)))

    async def version(self, request: web.Request) -> web.StreamResponse:
        self.versions_asked += 1
        return await _awaited(self.versions(dict(request.query)))


async def _awaited(response: Awaitable[web.StreamResponse] | web.StreamResponse) -> web.StreamResponse:
    return await response if isinstance(response, Awaitable) else response


@asynccontextmanager
async def running_ctgov() -> AsyncIterator[FakeCtGov]:
    fake = FakeCtGov()
    app = web.Application()
    app.router.add_get("/api/v2/studies", fake.studies)
    app.router.add_get("/api/v2/version", fake.version)
    runner = web.AppRunner(app, shutdown_timeout=0.1, max_line_size=1 << 20)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield fake
    finally:
        await runner.cleanup()


def settings(ctgov: FakeCtGov, **options: Any) -> CtGovSettings:
    return CtGovSettings(base_url=ctgov.url, **{"timeout_s": 2.0, **options})


async def search(ctgov: FakeCtGov, term: str = "aspirin", retmax: int = 100, **options: Any) -> SearchResult:
    async with CtGovEngine(settings(ctgov, **options)) as engine:
        return await engine.search(SearchRequest(term, retmax=retmax, sort="relevance"))


async def unavailable(ctgov: FakeCtGov, respond: Responder | None = None, **options: Any) -> EngineUnavailable:
    if respond is not None:
        ctgov.respond = respond
    with pytest.raises(EngineUnavailable) as caught:
        await search(ctgov, **options)
    return caught.value


def always(body: Any, status: int = 200, content_type: str = "application/json", **headers: str) -> Responder:
    text = body if isinstance(body, str) else json.dumps(body)
    return lambda _: web.Response(text=text, status=status, content_type=content_type, headers=headers)


def refuses(bad: Callable[[Query], bool], text: str = SYNTAX) -> Responder:
    return lambda query: web.Response(text=text, status=400) if bad(query) else good(query)  # type: ignore[return-value]
