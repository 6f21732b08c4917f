"""A real HTTP server in NCBI's place, with answers as they have been seen from it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web

from rewarders.engines.base import EngineUnavailable, SearchRequest, SearchResult
from rewarders.engines.pubmed import PubMedEngine, PubMedSettings

KEY = "0123456789abcdef0123456789abcdef0123"
RATE_LIMIT = {"error": "API rate limit exceeded", "api-key": "203.0.113.7", "count": "11", "limit": "10"}
OUTAGE = "Search Backend failed: Couldn't resolve #pmquerysrv-mz?dbaf=pubmed, the address table is empty."
SYNTAX = "Search Backend failed: Exception:\n'unexpected end of query'"

Form = dict[str, str]
Responder = Callable[[Form], Awaitable[web.StreamResponse] | web.StreamResponse]


def result(ids: list[str], count: int | None = None, **extra: Any) -> dict[str, Any]:
    answer = {"count": str(len(ids) if count is None else count), "idlist": ids, **extra}
    return {"header": {"type": "esearch", "version": "0.3"}, "esearchresult": answer}


def error(text: str) -> dict[str, Any]:
    return {"header": {"type": "esearch"}, "esearchresult": {"ERROR": text}}


def good(form: Form) -> web.Response:
    return web.json_response(result(["11", "12", "13"][: int(form["retmax"])], 3))


@dataclass
class FakeNcbi:
    """Answers with `respond`; keeps every form it was sent and which connection carried it."""

    respond: Responder = good
    forms: list[Form] = field(default_factory=list)
    connections: set[int] = field(default_factory=set)
    url: str = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        assert request.method == "POST"
        assert request.query_string == ""
        form = {name: str(value) for name, value in (await request.post()).items()}
        self.forms.append(form)
        self.connections.add(id(request.transport))
        response = self.respond(form)
        return await response if isinstance(response, Awaitable) else response


@asynccontextmanager
async def running_ncbi() -> AsyncIterator[FakeNcbi]:
    fake = FakeNcbi()
    app = web.Application()
    app.router.add_route("*", "/entrez/eutils/esearch.fcgi", fake.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}/entrez/eutils/"
    try:
        yield fake
    finally:
        await runner.cleanup()


def settings(ncbi: FakeNcbi, **options: Any) -> PubMedSettings:
    return PubMedSettings(base_url=ncbi.url, **{"timeout_s": 2.0, "api_key_env": None, **options})


async def search(ncbi: FakeNcbi, term: str = "aspirin", retmax: int = 100, **options: Any) -> SearchResult:
    async with PubMedEngine(settings(ncbi, **options)) as engine:
        return await engine.search(SearchRequest(term, retmax=retmax))


async def unavailable(ncbi: FakeNcbi, respond: Responder | None = None, **options: Any) -> EngineUnavailable:
    if respond is not None:
        ncbi.respond = respond
    with pytest.raises(EngineUnavailable) as caught:
        await search(ncbi, **options)
    return caught.value


def always(body: Any, status: int = 200, content_type: str = "application/json", **headers: str) -> Responder:
    text = body if isinstance(body, str) else json.dumps(body)
    return lambda _: web.Response(text=text, status=status, content_type=content_type, headers=headers)


def refuses(bad: Callable[[Form], bool], text: str = SYNTAX) -> Responder:
    return lambda form: web.json_response(error(text)) if bad(form) else good(form)
