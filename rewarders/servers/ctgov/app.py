"""An HTTP server that speaks the ClinicalTrials.gov API v2 over a local folder, with latency, quota and faults."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from rewarders.servers.ctgov import answers
from rewarders.servers.ctgov.faults import Faults
from rewarders.servers.ctgov.index import Index
from rewarders.servers.ctgov.parameters import StudiesError, StudiesRequest, page_token, studies_request
from rewarders.servers.hosting import Hosted, host, run_until_signal
from rewarders.servers.index_cache import Progress
from rewarders.servers.traffic import ServerSettings as CommonSettings
from rewarders.servers.traffic import Traffic

API_FOLDER = "/api/v2"
MAX_URL_CHARACTERS = 8_000
# Above this size one search may hold up the event loop for a millisecond and more, so it goes to a thread.
INLINE_RECORDS = 20_000


@dataclass(frozen=True, slots=True)
class ServerSettings(CommonSettings):
    """What to serve, and how like the real service it is (which publishes no limit and sends no rate headers).

    Args:
        corpus: folder of study records or BEIR folder (see `records`).
        data_timestamp: what /version says; None for one made from the records.
    """

    data_timestamp: str | None = None


class CtGovApp:
    """The requests' handlers and what they share."""

    def __init__(self, index: Index, settings: ServerSettings) -> None:
        self._index = index
        self._settings = settings
        self._traffic = Traffic(settings)
        self._faults = Faults(settings.fault_plan)

    def application(self) -> web.Application:
        application = web.Application()
        application.router.add_get(f"{API_FOLDER}/studies", self.studies)
        application.router.add_get(f"{API_FOLDER}/version", self.version)
        application.router.add_get("/health", self.health)
        application.router.add_route("*", "/{anything:.*}", self.not_found)
        return application

    async def health(self, _: web.Request) -> web.Response:
        return web.json_response(self._traffic.health(len(self._index), self._faults.counts))

    async def not_found(self, _: web.Request) -> web.Response:
        return web.Response(status=404, text=answers.NOT_FOUND_PAGE, content_type="text/html")

    async def studies(self, request: web.Request) -> web.Response:
        return await self._serve(request, lambda: self._studies(request))

    async def version(self, request: web.Request) -> web.Response:
        return await self._serve(request, self._version)

    async def _serve(self, request: web.Request, answer: Callable[[], Any]) -> web.Response:
        """The quota comes before anything else and costs no latency."""
        self._traffic.requests += 1
        if len(request.raw_path) > MAX_URL_CHARACTERS:
            return web.Response(status=414, text=answers.TOO_LONG_PAGE, content_type="text/html")
        verdict = self._traffic.admit(request.remote or "unknown")
        if verdict is not None and not verdict.admitted:
            return web.Response(status=429, text="Too Many Requests", headers=self._traffic.refusal_headers)
        # Before the latency, so that the sequence follows the order of arrival.
        fault = self._faults.draw(self._traffic.elapsed_s)
        await self._traffic.wait()
        response: web.Response = await (answer() if fault is None else self._faults.deliver(fault, request, answer))
        return response

    # Answers.

    async def _version(self) -> web.Response:
        return _json(answers.version(self._settings.data_timestamp or self._index.data_timestamp))

    async def _studies(self, request: web.Request) -> web.Response:
        try:
            asked = studies_request(request.query)
        except StudiesError as error:
            return web.Response(status=400, text=str(error))
        if len(self._index) <= INLINE_RECORDS:
            return _json(self._page(asked))
        return _json(await asyncio.to_thread(self._page, asked))

    def _page(self, asked: StudiesRequest) -> str:
        """A page has the token of the next one if it is full, even if that one is empty: so does the service."""
        total, ids = self._index.search(asked.search, asked.start, asked.page_size)
        following = asked.start + len(ids)
        token = page_token(following) if len(ids) == asked.page_size else None
        studies = [self._study(trial, asked.paths) for trial in ids]
        return answers.page(studies, total if asked.count_total else None, token)

    def _study(self, trial: str, paths: tuple[str, ...] | None) -> Any:
        if paths == answers.ID_PATHS:
            return answers.id_only(trial)
        record = self._index.record(trial)
        return record if paths is None else answers.projected(record, paths)


def _json(text: str) -> web.Response:
    return web.Response(text=text, content_type="application/json", charset="UTF-8")


class RunningServer(Hosted):
    """A server that accepts connections. Closing it (or leaving `async with`) frees the port."""

    def __init__(self, runner: web.AppRunner, place: str, index: Index) -> None:
        super().__init__(runner, place)
        self.index = index

    @property
    def studies_url(self) -> str:
        return f"{self.base_url}{API_FOLDER}/studies"


async def serve(settings: ServerSettings, index: Index | None = None) -> RunningServer:
    """Start serving in the running event loop. Without an index, the folder's is opened, or built first.

    Raises:
        DataError: the records are missing or broken, or their index cannot be written.
        SearchServerError: the port cannot be had.
    """
    if index is None:
        index = await asyncio.to_thread(Index.of_corpus, settings.corpus, settings.cache_folder)
    runner = await host(CtGovApp(index, settings).application(), settings.host, settings.port)
    return RunningServer(runner, settings.host, index)


def run(settings: ServerSettings, progress: Progress | None = None, say: Callable[[str], None] | None = None) -> None:
    """Serve until SIGINT or SIGTERM, then return. One line is said once the server listens.

    Args:
        progress: called with (records done, records in all) while an index is built.
        say: how to say the line; None prints it.

    Raises:
        DataError, SearchServerError: as `serve`.
    """

    def describe(server: RunningServer) -> str:
        parts = settings.description(f"{len(server.index):,} trials")
        return f"ClinicalTrials.gov search server: {server.studies_url} ({parts}); Ctrl-C stops it"

    run_until_signal(
        lambda: Index.of_corpus(settings.corpus, settings.cache_folder, progress),
        lambda index: serve(settings, index),
        describe,
        say,
    )
