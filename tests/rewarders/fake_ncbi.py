"""A real HTTP server in NCBI's place, with answers as they have been seen from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from rewarders.engines.permits import Permit, unlimited
from rewarders.engines.pubmed import PubMedEngine, PubMedSettings
from tests.rewarders.fake_upstream import FakeUpstream, Parameters, Responder

KEY = "0123456789abcdef0123456789abcdef0123"
RATE_LIMIT = {"error": "API rate limit exceeded", "api-key": "203.0.113.7", "count": "11", "limit": "10"}
OUTAGE = "Search Backend failed: Couldn't resolve #pmquerysrv-mz?dbaf=pubmed, the address table is empty."
SYNTAX = "Search Backend failed: Exception:\n'unexpected end of query'"


def result(ids: list[str], count: int | None = None, **extra: Any) -> dict[str, Any]:
    answer = {"count": str(len(ids) if count is None else count), "idlist": ids, **extra}
    return {"header": {"type": "esearch", "version": "0.3"}, "esearchresult": answer}


def error(text: str) -> dict[str, Any]:
    return {"header": {"type": "esearch"}, "esearchresult": {"ERROR": text}}


def good(form: Parameters) -> web.Response:
    return web.json_response(result(["11", "12", "13"][: int(form["retmax"])], 3))


@dataclass
class FakeNcbi(FakeUpstream):
    """Takes nothing but a POST whose parameters are all in the form."""

    respond: Responder = good

    term = "term"
    sort = "pub_date"

    def routes(self) -> Sequence[web.AbstractRouteDef]:
        return [web.route("*", "/entrez/eutils/esearch.fcgi", self._esearch)]

    async def _esearch(self, request: web.Request) -> web.StreamResponse:
        assert request.method == "POST"
        assert request.query_string == ""
        return await self.answer(request, {name: str(value) for name, value in (await request.post()).items()})

    def good(self, parameters: Parameters) -> web.Response:
        return good(parameters)

    def unexplained(self) -> web.Response:
        return web.json_response(error(SYNTAX))

    def engine(self, *, permit: Permit = unlimited, **options: Any) -> PubMedEngine:
        settings = PubMedSettings(base_url=self.url, **{"timeout_s": 2.0, "api_key_env": None, **options})
        return PubMedEngine(settings, permit=permit)


def refuses(bad: Callable[[Parameters], bool], text: str = SYNTAX) -> Responder:
    return lambda form: web.json_response(error(text)) if bad(form) else good(form)
