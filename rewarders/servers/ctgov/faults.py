"""Requests that fail as they fail at ClinicalTrials.gov, for tests and benchmarks of everything behind the server.

No body of its 429, 403 or 5xx has been recorded; these are the pages of the web servers it uses. Every kind is an
outage to a careful client. None is a wrong query.
"""

from __future__ import annotations

import json
from enum import Enum
from typing import cast

from aiohttp import web

from rewarders.servers.ctgov import answers
from rewarders.servers.faults import Answer, Fault, FaultPlan, FaultSequence, cut_short


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
        super().__init__(FaultKind, _PAGES, plan)

    async def deliver(self, fault: Fault[FaultKind], request: web.Request, answer: Answer) -> web.Response:
        """Fail `request`; `answer` gives what would have been said without the fault."""
        match fault.kind:
            case FaultKind.TRUNCATED:
                # A refusal is not cut, because half of it is still a refusal.
                whole = await answer()
                return cut_short(whole, fault.detail) if whole.status == 200 else self._page(FaultKind.BAD_GATEWAY)
            case FaultKind.INCOMPLETE:
                return _without_studies(await answer(), fault.detail) or self._page(FaultKind.BAD_GATEWAY)
        return await self._fail(fault, request, answer)


def _without_studies(response: web.Response, detail: float) -> web.Response | None:
    """A result that lacks studies and does not go on; None for an answer that has none to lack."""
    body = json.loads(cast(str, response.text)) if response.status == 200 else {}
    studies = body.get("studies")
    if not studies:
        return None
    body["studies"] = studies[: int(detail * len(studies))]
    body.pop("nextPageToken", None)
    return web.json_response(body)
