"""An HTTP server that speaks NCBI's esearch over a local corpus, with the latency, quota and errors of NCBI.

Many failures of the real service come with status 200 and `esearchresult.ERROR`; so do they here.
"""

from __future__ import annotations

import asyncio
import errno
import random
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import cast

from aiohttp import web

from rewarders.servers.pubmed import answers
from rewarders.servers.pubmed.build import Progress
from rewarders.servers.pubmed.faults import Faults
from rewarders.servers.pubmed.index import Index, SearchResult
from rewarders.servers.pubmed.parameters import EsearchError, SearchRequest, search_of
from rewarders.servers.pubmed.query import QuerySyntaxError
from rewarders.servers.pubmed.quota import SlidingLog, Verdict

ESEARCH_PATH = "/entrez/eutils/esearch.fcgi"
MAX_URL_CHARACTERS = 8_000
# Above this size one search may hold up the event loop for a millisecond and more, so it goes to a thread.
INLINE_DOCUMENTS = 50_000
IDENTITIES_KEPT = 10_000


class SearchServerError(RuntimeError):
    """The server cannot start. The message is one line and says what to do."""


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What to serve, and how like the real service it is.

    Args:
        corpus: BEIR folder (`corpus.jsonl`).
        port: 0 takes a free one.
        cache_folder: where indexes are kept; None for the user's cache folder.
        latency_ms, jitter_ms: each answer takes `latency_ms` plus uniformly 0 to `jitter_ms` milliseconds.
        quota, window_s: at most `quota` requests per API key (or per client address without one) in any
            `window_s` seconds, others get status 429; None for no limit (and no rate headers).
        retry_after_s: value of a Retry-After header on 429; None for no such header, as seen from NCBI in
            2026.
        seed: of the jitter.
        fault_rate: share of the requests that fail as they do at NCBI (`faults.FaultKind`), 0 to below 1.
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


class PubMedApp:
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
        application.router.add_get(ESEARCH_PATH, self.esearch)
        application.router.add_post(ESEARCH_PATH, self.esearch)
        application.router.add_get("/health", self.health)
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

    async def esearch(self, request: web.Request) -> web.Response:
        """Quota and key are checked before anything else, as NCBI's gateway does, and cost no latency."""
        self._requests += 1
        if len(request.raw_path) > MAX_URL_CHARACTERS:
            return web.Response(status=414, text="<html><body>414 Request-URI Too Large</body></html>")
        parameters = dict(request.query)
        if request.method == "POST":
            parameters.update((key, str(value)) for key, value in (await request.post()).items())
        api_key = parameters.get("api_key")
        if api_key is not None and not api_key.strip():
            return _json(answers.invalid_key_body(api_key), status=400)
        identity = api_key or request.remote or "unknown"
        verdict = self._admit(identity)
        if verdict is not None and not verdict.admitted:
            self._refused += 1
            return self._refusal(identity, verdict)
        response = await self._respond(request, identity, parameters)
        if verdict is not None:
            response.headers.update(self._rate_headers(verdict))
        return response

    async def _respond(self, request: web.Request, identity: str, parameters: Mapping[str, str]) -> web.Response:
        fault = self._faults.draw()  # before the latency, so that the sequence follows the order of arrival
        await self._wait()
        if fault is None:
            return await self._answer(parameters)
        return await self._faults.deliver(
            fault, request, identity, _wants_json(parameters), lambda: self._answer(parameters)
        )

    # Quota and latency.

    def _admit(self, identity: str) -> Verdict | None:
        if self._settings.quota is None:
            return None
        if identity not in self._logs:
            if len(self._logs) >= IDENTITIES_KEPT:
                self._logs.pop(next(iter(self._logs)))
            self._logs[identity] = SlidingLog(self._settings.quota, self._settings.window_s)
        return self._logs[identity].admit(time.monotonic())

    def _refusal(self, identity: str, verdict: Verdict) -> web.Response:
        headers = self._rate_headers(verdict)
        if self._settings.retry_after_s is not None:
            headers["Retry-After"] = f"{self._settings.retry_after_s:g}"
        limit = cast(int, self._settings.quota)
        return _json(answers.rate_limit_body(identity, verdict.count, limit), status=429, headers=headers)

    def _rate_headers(self, verdict: Verdict) -> dict[str, str]:
        return {
            "X-RateLimit-Limit": str(self._settings.quota),
            "X-RateLimit-Remaining": str(verdict.remaining),
        }

    async def _wait(self) -> None:
        delay_ms = self._settings.latency_ms + self._random.uniform(0.0, self._settings.jitter_ms)
        if delay_ms > 0:
            await asyncio.sleep(delay_ms / 1000)

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


class RunningServer:
    """A server that accepts connections. Closing it (or leaving `async with`) frees the port."""

    def __init__(self, runner: web.AppRunner, settings: ServerSettings, index: Index) -> None:
        self._runner = runner
        self._settings = settings
        self.index = index
        self.port: int = runner.addresses[0][1]

    @property
    def base_url(self) -> str:
        """What takes the place of `https://eutils.ncbi.nlm.nih.gov`."""
        host = f"[{self._settings.host}]" if ":" in self._settings.host else self._settings.host
        return f"http://{host}:{self.port}"

    @property
    def esearch_url(self) -> str:
        return self.base_url + ESEARCH_PATH

    async def close(self) -> None:
        await self._runner.cleanup()

    async def __aenter__(self) -> RunningServer:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


async def serve(settings: ServerSettings, index: Index | None = None) -> RunningServer:
    """Start serving in the running event loop. Without an index, the corpus's is opened, or built first.

    Raises:
        DataError: the corpus is missing or has a broken line, or its index cannot be written.
        SearchServerError: the port cannot be had.
    """
    if index is None:
        index = await asyncio.to_thread(Index.of_corpus, settings.corpus, settings.cache_folder)
    application = PubMedApp(index, settings).application()
    # No access log: it would hold API keys. Signals are left to whoever owns the event loop.
    runner = web.AppRunner(
        application, access_log=None, handle_signals=False, shutdown_timeout=1.0, max_line_size=1 << 17
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, settings.host, settings.port).start()
    except (OSError, OverflowError) as error:
        await runner.cleanup()
        raise SearchServerError(_port_message(settings, error)) from None
    return RunningServer(runner, settings, index)


def run(settings: ServerSettings, progress: Progress | None = None, say: Callable[[str], None] | None = None) -> None:
    """Serve until SIGINT or SIGTERM, then return. One line is said once the server listens.

    Args:
        progress: called with (documents done, documents in all) while an index is built.
        say: how to say the line; None prints it.

    Raises:
        DataError, SearchServerError: as `serve`.
    """
    # While the index is built there is no event loop to take signals, and an interrupted build must clean up.
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        index = Index.of_corpus(settings.corpus, settings.cache_folder, progress)
        asyncio.run(_serve_until_signal(settings, index, say or _print_line))
    except KeyboardInterrupt:
        return
    finally:
        signal.signal(signal.SIGTERM, previous)


async def _serve_until_signal(settings: ServerSettings, index: Index, say: Callable[[str], None]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with await serve(settings, index) as server:
        say(f"PubMed search server: {server.esearch_url} ({_description(settings, index)}); Ctrl-C stops it")
        await stop.wait()


def _description(settings: ServerSettings, index: Index) -> str:
    parts = [f"{len(index):,} documents"]
    if settings.latency_ms or settings.jitter_ms:
        parts.append(f"latency {settings.latency_ms:g} ms + up to {settings.jitter_ms:g} ms")
    if settings.quota is not None:
        parts.append(f"quota {settings.quota} per {settings.window_s:g} s")
    if settings.fault_rate:
        parts.append(f"{settings.fault_rate:.0%} of the requests fail")
    return ", ".join(parts)


def _print_line(line: str) -> None:
    print(line, flush=True)


def _port_message(settings: ServerSettings, error: OSError | OverflowError) -> str:
    place = f"{settings.host}:{settings.port}"
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return f"{place} is in use: stop what listens there or choose another port"
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"cannot listen on {place} ({reason}): choose another host or port"
