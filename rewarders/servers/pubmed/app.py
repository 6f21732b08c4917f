"""An HTTP server that speaks NCBI's esearch over a local corpus, with the latency, quota and errors of NCBI.

Many failures of the real service come with status 200 and `esearchresult.ERROR`; so do they here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import cast

from aiohttp import web

from rewarders.servers.hosting import Hosted, host, run_until_signal
from rewarders.servers.index_cache import Progress
from rewarders.servers.pubmed import answers
from rewarders.servers.pubmed.faults import Faults
from rewarders.servers.pubmed.index import Index, SearchResult
from rewarders.servers.pubmed.parameters import EsearchError, SearchRequest, search_of
from rewarders.servers.pubmed.query import QuerySyntaxError
from rewarders.servers.quota import Verdict
from rewarders.servers.traffic import ServerSettings, Traffic

ESEARCH_PATH = "/entrez/eutils/esearch.fcgi"
MAX_URL_CHARACTERS = 8_000
# Above this size one search may hold up the event loop for a millisecond and more, so it goes to a thread.
INLINE_DOCUMENTS = 50_000


class PubMedApp:
    """The requests' handlers and what they share."""

    def __init__(self, index: Index, settings: ServerSettings) -> None:
        self._index = index
        self._settings = settings
        self._traffic = Traffic(settings)
        self._faults = Faults(settings.fault_plan)

    def application(self) -> web.Application:
        application = web.Application()
        application.router.add_get(ESEARCH_PATH, self.esearch)
        application.router.add_post(ESEARCH_PATH, self.esearch)
        application.router.add_get("/health", self.health)
        return application

    async def health(self, _: web.Request) -> web.Response:
        return web.json_response(self._traffic.health(len(self._index), self._faults.counts))

    async def esearch(self, request: web.Request) -> web.Response:
        """Quota and key are checked before anything else, as NCBI's gateway does, and cost no latency."""
        self._traffic.requests += 1
        if len(request.raw_path) > MAX_URL_CHARACTERS:
            return web.Response(status=414, text="<html><body>414 Request-URI Too Large</body></html>")
        parameters = dict(request.query)
        if request.method == "POST":
            parameters.update((key, str(value)) for key, value in (await request.post()).items())
        api_key = parameters.get("api_key")
        if api_key is not None and not api_key.strip():
            return _json(answers.invalid_key_body(api_key), status=400)
        identity = api_key or request.remote or "unknown"
        verdict = self._traffic.admit(identity)
        if verdict is not None and not verdict.admitted:
            return self._refusal(identity, verdict)
        response = await self._respond(request, identity, parameters)
        if verdict is not None:
            response.headers.update(self._rate_headers(verdict))
        return response

    async def _respond(self, request: web.Request, identity: str, parameters: Mapping[str, str]) -> web.Response:
        # Before the latency, so that the sequence follows the order of arrival.
        fault = self._faults.draw(self._traffic.elapsed_s)
        await self._traffic.wait()
        if fault is None:
            return await self._answer(parameters)
        return await self._faults.deliver(
            fault, request, identity, _wants_json(parameters), lambda: self._answer(parameters)
        )

    def _refusal(self, identity: str, verdict: Verdict) -> web.Response:
        headers = self._rate_headers(verdict) | self._traffic.refusal_headers
        limit = cast(int, self._settings.quota)
        return _json(answers.rate_limit_body(identity, verdict.count, limit), status=429, headers=headers)

    def _rate_headers(self, verdict: Verdict) -> dict[str, str]:
        return {
            "X-RateLimit-Limit": str(self._settings.quota),
            "X-RateLimit-Remaining": str(verdict.remaining),
        }

    # One search.

    async def _answer(self, parameters: Mapping[str, str]) -> web.Response:
        as_json = _wants_json(parameters)
        try:
            text = await self._result(parameters, as_json)
        except (EsearchError, QuerySyntaxError) as error:
            message = str(error) if isinstance(error, EsearchError) else _backend_failure(error)
            text = answers.json_error(message) if as_json else answers.xml_error(message)
        return _json(text) if as_json else web.Response(text=text, content_type="text/xml", charset="UTF-8")

    async def _result(self, parameters: Mapping[str, str], as_json: bool) -> str:
        search = search_of(parameters)
        result = await self._search(search)
        if parameters.get("rettype", "").lower() == "count":
            return answers.json_count(result) if as_json else answers.xml_count(result)
        write = answers.json_result if as_json else answers.xml_result
        return write(result, search.retstart, list(search.messages))

    async def _search(self, search: SearchRequest) -> SearchResult:
        arguments = (search.term, search.retmax, search.retstart, search.sort, search.mindate, search.maxdate)
        if len(self._index) <= INLINE_DOCUMENTS:
            return self._index.search(*arguments)
        return await asyncio.to_thread(self._index.search, *arguments)


def _wants_json(parameters: Mapping[str, str]) -> bool:
    return parameters.get("retmode", "xml").lower() == "json"


def _backend_failure(error: QuerySyntaxError) -> str:
    return f"Search Backend failed: Exception:\n'term' cannot be parsed: {error}"


def _json(text: str, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(text=text, status=status, headers=headers, content_type="application/json", charset="UTF-8")


class RunningServer(Hosted):
    """A server that accepts connections. Closing it (or leaving `async with`) frees the port."""

    def __init__(self, runner: web.AppRunner, place: str, index: Index) -> None:
        super().__init__(runner, place)
        self.index = index

    @property
    def esearch_url(self) -> str:
        return self.base_url + ESEARCH_PATH


async def serve(settings: ServerSettings, index: Index | None = None) -> RunningServer:
    """Start serving in the running event loop. Without an index, the corpus's is opened, or built first.

    Raises:
        DataError: the corpus is missing or has a broken line, or its index cannot be written.
        SearchServerError: the port cannot be had.
    """
    if index is None:
        index = await asyncio.to_thread(Index.of_corpus, settings.corpus, settings.cache_folder)
    runner = await host(PubMedApp(index, settings).application(), settings.host, settings.port)
    return RunningServer(runner, settings.host, index)


def run(settings: ServerSettings, progress: Progress | None = None, say: Callable[[str], None] | None = None) -> None:
    """Serve until SIGINT or SIGTERM, then return. One line is said once the server listens.

    Args:
        progress: called with (documents done, documents in all) while an index is built.
        say: how to say the line; None prints it.

    Raises:
        DataError, SearchServerError: as `serve`.
    """

    def describe(server: RunningServer) -> str:
        parts = settings.description(f"{len(server.index):,} documents")
        return f"PubMed search server: {server.esearch_url} ({parts}); Ctrl-C stops it"

    run_until_signal(
        lambda: Index.of_corpus(settings.corpus, settings.cache_folder, progress),
        lambda index: serve(settings, index),
        describe,
        say,
    )
