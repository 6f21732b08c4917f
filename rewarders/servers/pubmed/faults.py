"""Requests that fail as they fail at NCBI, for tests and benchmarks of everything behind the search server.

The bodies are those seen from the real service: its 500 page, its 429, the backend errors of 2025-07-04 and earlier
under status 200. Every kind is an outage to a careful client. None is a wrong query.
"""

from __future__ import annotations

import json
from enum import Enum
from typing import cast

from aiohttp import web

from rewarders.servers.faults import Answer, Fault, FaultPlan, FaultSequence, cut_short
from rewarders.servers.pubmed import answers


class FaultKind(Enum):
    """One way in which the service fails; the value is its name in `/health`."""

    SERVER_ERROR = "http_500"
    BAD_GATEWAY = "http_502"
    MAINTENANCE = "http_503"
    RATE_LIMIT = "http_429"
    RATE_LIMIT_200 = "rate_limit_under_200"
    HTML_200 = "html_under_200"
    BACKEND = "backend_error"
    TRUNCATED = "truncated"
    EMPTY = "empty_idlist"
    CLOSED = "closed"
    RESET = "reset"
    LATE = "late"


_PAGES = {
    FaultKind.SERVER_ERROR: (
        500,
        "<head> <title>NCBI/eutils202 - WWW Error 500 Diagnostic</title> </head> <body> <h1>Server Error</h1>   "
        "<p>Your request could not be processed due to a problem on our Web server.  This could be a transient "
        "problem, please try the query again.</p> </body>",
    ),
    FaultKind.BAD_GATEWAY: (
        502,
        "<html>\r\n<head><title>502 Bad Gateway</title></head>\r\n<body>\r\n<center><h1>502 Bad Gateway</h1></center>"
        "\r\n</body>\r\n</html>\r\n",
    ),
    FaultKind.MAINTENANCE: (
        503,
        "<html><body><h1>503 Service Unavailable</h1>\nNo server is available to handle this request.\n</body></html>",
    ),
    FaultKind.HTML_200: (
        200,
        "<html><head><title>NCBI</title></head><body><p>The service is down for maintenance.</p></body></html>",
    ),
}
BACKEND_FAILURES = (
    "Search Backend failed: Couldn't resolve #pmquerysrv-mz?dbaf=pubmed, the address table is empty.",
    "Search Backend failed: Database is not supported: pubmed",
    "Search Backend failed: Unable to open connection to #PMQuerySrv?dbaf=pubmed",
)
# What the 429 names where the server itself has no quota: the limit of a key, and one request more.
_KEY_LIMIT = 10


class Faults(FaultSequence[FaultKind]):
    """NCBI's faults; see `FaultSequence`."""

    def __init__(self, plan: FaultPlan) -> None:
        super().__init__(FaultKind, _PAGES, plan)

    async def deliver(
        self, fault: Fault[FaultKind], request: web.Request, identity: str, as_json: bool, answer: Answer
    ) -> web.Response:
        """Fail `request`.

        Args:
            identity: API key or address of the caller, which NCBI's 429 names.
            answer: what would have been said without the fault.
        """
        match fault.kind:
            case FaultKind.RATE_LIMIT | FaultKind.RATE_LIMIT_200:
                status = 429 if fault.kind is FaultKind.RATE_LIMIT else 200
                text = answers.rate_limit_body(identity, _KEY_LIMIT + 1, _KEY_LIMIT)
                return self._failure(status, text, "application/json")
            case FaultKind.BACKEND:
                return _backend_failure(fault.detail, as_json)
            case FaultKind.TRUNCATED:
                return cut_short(await answer(), fault.detail)
            case FaultKind.EMPTY:
                return _without_ids(await answer()) or self._page(FaultKind.BAD_GATEWAY)
        return await self._fail(fault, request, answer)


def _without_ids(response: web.Response) -> web.Response | None:
    """A count without its ids; None for an answer that has none to lack, or is not JSON."""
    is_json = response.content_type == "application/json"
    body = json.loads(cast(str, response.text)) if is_json else {}
    answer = body.get("esearchresult", {})
    if not answer.get("idlist"):
        return None
    answer["idlist"] = []
    return web.json_response(body)


def _backend_failure(detail: float, as_json: bool) -> web.Response:
    message = BACKEND_FAILURES[int(detail * len(BACKEND_FAILURES))]
    if as_json:
        return web.Response(text=answers.json_error(message), content_type="application/json", charset="UTF-8")
    return web.Response(text=answers.xml_error(message), content_type="text/xml", charset="UTF-8")
