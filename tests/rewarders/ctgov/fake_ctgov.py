"""A real HTTP server in the place of ClinicalTrials.gov, with answers as they have been seen from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from rewarders.engines.ctgov import CtGovEngine, CtGovSettings
from rewarders.engines.permits import Permit, unlimited
from tests.rewarders.fake_upstream import FakeUpstream, Parameters, Responder, awaited

VERSION = {"apiVersion": "2.0.5", "dataTimestamp": "2026-08-07T09:00:05"}
SYNTAX = "Error parsing query in Other terms: missing ')' at '<EOF>'"


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


def paged(ids: list[str]) -> Callable[[Parameters], web.Response]:
    """Serves a list as the service does: a full page names the next one, only the first one has the count."""

    def respond(query: Parameters) -> web.Response:
        start, size = int(query.get("pageToken", "0")), int(query["pageSize"])
        chosen = ids[start : start + size]
        token = str(start + size) if len(chosen) == size else None
        return web.json_response(page(chosen, len(ids) if start == 0 else None, token))

    return respond


good = paged(trials(1, 3))


@dataclass
class FakeCtGov(FakeUpstream):
    """Takes no parameter twice; says its version with `versions`."""

    respond: Responder = good
    versions: Responder = lambda _: web.json_response(VERSION)
    versions_asked: int = 0

    term = "query.term"
    sort = "relevance"

    def routes(self) -> Sequence[web.AbstractRouteDef]:
        return [web.get("/api/v2/studies", self._studies), web.get("/api/v2/version", self._version)]

    async def _studies(self, request: web.Request) -> web.StreamResponse:
        assert len(request.query) == len(set(request.query)), "a parameter was sent twice"
        return await self.answer(request, dict(request.query))

    async def _version(self, request: web.Request) -> web.StreamResponse:
        self.versions_asked += 1
        return await awaited(self.versions(dict(request.query)))

    def good(self, parameters: Parameters) -> web.Response:
        return good(parameters)

    def unexplained(self) -> web.Response:
        return web.Response(status=400, text="Something else went wrong")

    def engine(self, *, permit: Permit = unlimited, **options: Any) -> CtGovEngine:
        return CtGovEngine(CtGovSettings(base_url=self.url, **{"timeout_s": 2.0, **options}), permit=permit)


def refuses(bad: Callable[[Parameters], bool], text: str = SYNTAX) -> Responder:
    return lambda query: web.Response(text=text, status=400) if bad(query) else good(query)
