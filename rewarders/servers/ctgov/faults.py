"""Requests that fail as they fail at ClinicalTrials.gov, for tests and benchmarks of everything behind the server.

No body of its 429, 403 or 5xx has been recorded; these are the pages of the web servers it uses. Every kind is an
outage to a careful client. None is a wrong query.
"""

from __future__ import annotations

import asyncio
import json
from enum import Enum
from typing import cast

from aiohttp import web

from rewarders.servers.ctgov import answers
from rewarders.servers.faults import Answer, Fault, FaultPlan, FaultSequence, closed, cut_short, reset


class FaultKind(Enum):
    """One way in which the service fails; the value is its name in `/health`."""

    SERVER_ERROR = "http_500"
    BAD_GATEWAY = "http_502"
    MAINTENANCE = "http_503"
    RATE_LIMIT = "http_429"
    FORBIDDEN = "http_403"
    NOT_FOUND = "http_404"
    HTML_200 = "html_under_200"
    TRUNCATED = "truncated"
    INCOMPLETE = "incomplete"
    CLOSED = "closed"
    RESET = "reset"
    LATE = "late"


def _html(title: str) -> str:
    return answers.NOT_FOUND_PAGE.replace("404 Not Found", title)


_PAGES = {
    FaultKind.SERVER_ERROR: (500, _html("500 Internal Server Error")),
    FaultKind.BAD_GATEWAY: (502, _html("502 Bad Gateway")),
    FaultKind.MAINTENANCE: (503, _html("503 Service Temporarily Unavailable")),
    FaultKind.RATE_LIMIT: (429, _html("429 Too Many Requests")),
    FaultKind.FORBIDDEN: (403, _html("403 Forbidden")),
    FaultKind.NOT_FOUND: (404, answers.NOT_FOUND_PAGE),
    FaultKind.HTML_200: (
        200,
        "<!DOCTYPE html><html><head><title>ClinicalTrials.gov</title></head><body></body></html>",
    ),
}


class Faults(FaultSequence[FaultKind]):
    """The faults of ClinicalTrials.gov; see `FaultSequence`."""

    def __init__(self, plan: FaultPlan) -> None:
        super().__init__(FaultKind, plan)

    async def deliver(self, fault: Fault[FaultKind], request: web.Request, answer: Answer) -> web.Response:
        """Fail `request`; `answer` gives what would have been said without the fault."""
        match fault.kind:
            case FaultKind.TRUNCATED:
                return _cut(await answer(), fault.detail)
            case FaultKind.INCOMPLETE:
                return _without_studies(await answer(), fault.detail)
            case FaultKind.CLOSED:
                return closed(request)
            case FaultKind.RESET:
                return reset(request)
            case FaultKind.LATE:
                await asyncio.sleep(self._plan.late_s)
                return await answer()
        status, page = _PAGES[fault.kind]
        return web.Response(status=status, text=page, content_type="text/html")


def _cut(response: web.Response, detail: float) -> web.Response:
    """The answer without its end. A refusal is not cut, because half of it is still a refusal."""
    if response.status != 200:
        return web.Response(status=502, text=_html("502 Bad Gateway"), content_type="text/html")
    return cut_short(response, detail)


def _without_studies(response: web.Response, detail: float) -> web.Response:
    """A result that lacks studies and does not go on; an answer that has none to lack fails as a whole."""
    body = json.loads(cast(str, response.text)) if response.status == 200 else {}
    studies = body.get("studies")
    if not studies:
        return web.Response(status=502, text=_html("502 Bad Gateway"), content_type="text/html")
    body["studies"] = studies[: int(detail * len(studies))]
    body.pop("nextPageToken", None)
    return web.json_response(body)
