"""An HTTP server that speaks the ClinicalTrials.gov API v2 over a local folder, with latency, quota and faults."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web

from rewarders.servers.ctgov import answers
from rewarders.servers.ctgov.build import Progress
from rewarders.servers.ctgov.faults import Faults
from rewarders.servers.ctgov.hosting import Hosted, host, run_until_signal
from rewarders.servers.ctgov.index import Index
from rewarders.servers.ctgov.parameters import StudiesError, StudiesRequest, page_token, studies_request
from rewarders.servers.pubmed.app import SearchServerError
from rewarders.servers.pubmed.quota import SlidingLog

API_FOLDER = "/api/v2"
MAX_URL_CHARACTERS = 8_000
# Above this size one search may hold up the event loop for a millisecond and more, so it goes to a thread.
INLINE_RECORDS = 20_000
CLIENTS_KEPT = 10_000


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What to serve, and how like the real service it is.

    Args:
        corpus: folder of study records or BEIR folder (see `records`).
        port: 0 takes a free one.
        cache_folder: where indexes are kept; None for the user's cache folder.
        latency_ms, jitter_ms: each answer takes `latency_ms` plus uniformly 0 to `jitter_ms` milliseconds.
        quota, window_s: at most `quota` requests per client address in any `window_s` seconds, others get status 429;
            None for no limit. (The real service publishes no limit and sends no rate headers.)
        retry_after_s: value of a Retry-After header on 429; None for no such header.
        data_timestamp: what /version says; None for one made from the records.
        seed: of the jitter.
        fault_rate: share of the requests that fail (`faults.FaultKind`), 0 to below 1.
        fault_seed: of the sequence of faults.
        fault_late_s: seconds before a late answer, one of the faults, leaves.
    """

    corpus: Path
    host: str = "127.0.0.1"
    port: int = 0
    cache_folder: Path | None = None
    latency_ms: float = 0.0
    jitter_ms: float = 0.0
    quota: int | None = None
    window_s: float = 1.0
    retry_after_s: float | None = None
    data_timestamp: str | None = None
    seed: int = 0
    fault_rate: float = 0.0
    fault_seed: int = 0
    fault_late_s: float = 60.0

    def __post_init__(self) -> None:
        if min(self.latency_ms, self.jitter_ms, self.fault_late_s) < 0:
            raise SearchServerError("latency, jitter and the delay of late answers must not be negative")
        if not 0.0 <= self.fault_rate < 1.0:
            raise SearchServerError(f"the fault rate must be at least 0 and below 1, got {self.fault_rate:g}")
        if self.quota is not None and (self.quota < 1 or self.window_s <= 0):
            raise SearchServerError("a quota needs at least 1 request and a window longer than 0 seconds")


class CtGovApp:
    """The requests' handlers and what they share."""

    def __init__(self, index: Index, settings: ServerSettings) -> None:
        self._index = index
        self._settings = settings
        self._logs: dict[str, SlidingLog] = {}
        self._random = random.Random(settings.seed)
        self._faults = Faults(settings.fault_rate, settings.fault_seed, settings.fault_late_s)
        self._requests = 0
        self._refused = 0

    def application(self) -> web.Application:
        application = web.Application()
        application.router.add_get(f"{API_FOLDER}/studies", self.studies)
        application.router.add_get(f"{API_FOLDER}/version", self.version)
        application.router.add_get("/health", self.health)
        application.router.add_route("*", "/{anything:.*}", self.not_found)
        return application

    async def health(self, _: web.Request) -> web.Response:
        state: dict[str, object] = {
            "status": "ok",
            "documents": len(self._index),
            "requests": self._requests,
            "refused": self._refused,
        }
        if self._settings.fault_rate:
            state["faults"] = dict(self._faults.counts)
        return web.json_response(state)

    async def not_found(self, _: web.Request) -> web.Response:
        return web.Response(status=404, text=answers.NOT_FOUND_PAGE, content_type="text/html")

    async def studies(self, request: web.Request) -> web.Response:
        return await self._serve(request, lambda: self._studies(request))

    async def version(self, request: web.Request) -> web.Response:
        return await self._serve(request, self._version)

    async def _serve(self, request: web.Request, answer: Callable[[], Any]) -> web.Response:
        """The quota comes before anything else and costs no latency."""
        self._requests += 1
        if len(request.raw_path) > MAX_URL_CHARACTERS:
            return web.Response(status=414, text=answers.TOO_LONG_PAGE, content_type="text/html")
        if not self._admits(request.remote or "unknown"):
            self._refused += 1
            return self._refusal()
        fault = self._faults.draw()  # before the latency, so that the sequence follows the order of arrival
        await self._wait()
        response: web.Response = await (answer() if fault is None else self._faults.deliver(fault, request, answer))
        return response

    # Quota and latency.

    def _admits(self, client: str) -> bool:
        if self._settings.quota is None:
            return True
        if client not in self._logs:
            if len(self._logs) >= CLIENTS_KEPT:
                self._logs.pop(next(iter(self._logs)))
            self._logs[client] = SlidingLog(self._settings.quota, self._settings.window_s)
        return self._logs[client].admit(time.monotonic()).admitted

    def _refusal(self) -> web.Response:
        wait = self._settings.retry_after_s
        headers = {} if wait is None else {"Retry-After": f"{wait:g}"}
        return web.Response(status=429, text="Too Many Requests", headers=headers)

    async def _wait(self) -> None:
        delay_ms = self._settings.latency_ms + self._random.uniform(0.0, self._settings.jitter_ms)
        if delay_ms > 0:
            await asyncio.sleep(delay_ms / 1000)

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

    def build() -> Index:
        return Index.of_corpus(settings.corpus, settings.cache_folder, progress)

    async def start(index: Index) -> RunningServer:
        return await serve(settings, index)

    def describe(server: RunningServer) -> str:
        parts = _description(settings, server.index)
        return f"ClinicalTrials.gov search server: {server.studies_url} ({parts}); Ctrl-C stops it"

    run_until_signal(build, start, describe, say)


def _description(settings: ServerSettings, index: Index) -> str:
    parts = [f"{len(index):,} trials"]
    if settings.latency_ms or settings.jitter_ms:
        parts.append(f"latency {settings.latency_ms:g} ms + up to {settings.jitter_ms:g} ms")
    if settings.quota is not None:
        parts.append(f"quota {settings.quota} per {settings.window_s:g} s")
    if settings.fault_rate:
        parts.append(f"{settings.fault_rate:.0%} of the requests fail")
    return ", ".join(parts)
