"""An HTTP server around one index: POST /search in MessagePack (see `retrieval_wire`), GET /health and /version."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec
from aiohttp import web

from rewarders.engines.base import EngineUnavailable
from rewarders.engines.retrieval_wire import (
    CONTENT_TYPE,
    MAX_BODY_BYTES,
    SEARCH_PATH,
    VERSION_PATH,
    Answer,
    Answers,
    Found,
    Refused,
    Search,
    Searches,
    Unanswered,
    Version,
)
from rewarders.servers.hosting import Hosted, host, run_until_signal
from rewarders.servers.index_cache import Progress
from rewarders.servers.retrieval.backend import Backend, Query, Ranking, Refusal
from rewarders.servers.retrieval.batcher import Batcher, Outcome
from rewarders.servers.retrieval.documents import DocumentStore
from rewarders.servers.traffic import ServerSettings, Traffic

MakeBackend = Callable[[Path, Path | None], Backend]
"""Makes a backend, not yet started, of (corpus, cache folder)."""


class RetrievalApp:
    """The requests' handlers and what they share."""

    def __init__(self, backend: Backend, documents: DocumentStore, batcher: Batcher, settings: ServerSettings) -> None:
        self._backend = backend
        self._documents = documents
        self._batcher = batcher
        self._traffic = Traffic(settings)
        self._fault_rate = settings.fault_rate
        self._faults = random.Random(settings.fault_seed)
        self._failed: Counter[str] = Counter()
        self._decoder = msgspec.msgpack.Decoder(Searches)
        self._encoder = msgspec.msgpack.Encoder()

    def application(self) -> web.Application:
        application = web.Application(client_max_size=MAX_BODY_BYTES)
        application.router.add_post(SEARCH_PATH, self.search)
        application.router.add_get("/health", self.health)
        application.router.add_get(VERSION_PATH, self.version)
        return application

    async def health(self, _: web.Request) -> web.Response:
        state = self._traffic.health(self._backend.size, self._failed)
        return web.json_response(state | {"kind": self._backend.kind, "batches": self._batcher.batches})

    async def version(self, _: web.Request) -> web.Response:
        about = Version(self._backend.kind, self._backend.version, self._backend.size)
        return web.Response(body=msgspec.json.encode(about), content_type="application/json")

    async def search(self, request: web.Request) -> web.Response:
        """Quota and faults are of requests, however many searches they hold."""
        self._traffic.requests += 1
        verdict = self._traffic.admit(request.remote or "unknown")
        if verdict is not None and not verdict.admitted:
            return web.Response(status=429, text="Too Many Requests", headers=self._traffic.refusal_headers)
        fails = self._faults.random() < self._fault_rate
        try:
            asked = self._decoder.decode(await request.read())
        except (msgspec.DecodeError, RecursionError) as error:
            return web.Response(status=400, text=f"not a request for searches: {error}")
        await self._traffic.wait()
        if fails:
            self._failed["status_503"] += 1
            return web.Response(status=503, text="Service Unavailable")
        return await self._answers(asked.searches)

    async def _answers(self, searches: list[Search]) -> web.Response:
        outcomes = await self._batcher.search([Query(search.term, search.k, search.rm3) for search in searches])
        pairs = list(zip(searches, outcomes, strict=True))
        if any(search.texts for search in searches):  # reading texts takes too long for the event loop
            encoded = await asyncio.to_thread(self._encode, pairs)
        else:
            encoded = self._encode(pairs)
        body = self._encoder.encode(Answers(self._backend.version, encoded))
        return web.Response(body=body, content_type=CONTENT_TYPE)

    def _encode(self, pairs: list[tuple[Search, Outcome]]) -> list[msgspec.Raw]:
        # Not the shared encoder: this may run in a thread.
        encode = msgspec.msgpack.Encoder().encode
        return [msgspec.Raw(encode(self._answer(search, outcome))) for search, outcome in pairs]

    def _answer(self, search: Search, outcome: Outcome) -> Answer:
        if isinstance(outcome, Refusal):
            return Refused(outcome.reason)
        if isinstance(outcome, EngineUnavailable):
            return Unanswered(outcome.reason)
        return self._found(outcome) if search.texts else Found(outcome.ids, outcome.count)

    def _found(self, ranking: Ranking) -> Answer:
        try:
            documents = self._documents.fetch(ranking.ids)
        except KeyError as error:
            return Unanswered(f"the index knows the document {error}, the corpus does not")
        titles, texts = (tuple(column) for column in zip(*documents, strict=True)) if documents else ((), ())
        return Found(ranking.ids, ranking.count, texts, titles)


class RunningServer(Hosted):
    """A server that accepts connections. Closing it (or leaving `async with`) frees everything."""

    def __init__(
        self, runner: web.AppRunner, place: str, backend: Backend, documents: DocumentStore, batcher: Batcher
    ) -> None:
        super().__init__(runner, place)
        self.backend = backend
        self._documents = documents
        self._batcher = batcher

    async def close(self) -> None:
        await self._batcher.close()
        await super().close()
        await self.backend.close()
        self._documents.close()


async def serve(settings: ServerSettings, backend: Backend, documents: DocumentStore | None = None) -> RunningServer:
    """Start a backend and serve it in the running event loop.

    Args:
        backend: over the corpus of the settings, not yet started; closed with the server.
        documents: of that corpus, closed with the server too; None: opened, or built first.

    Raises:
        DataError: the corpus is missing or broken, or its index cannot be written.
        SearchServerError: the backend cannot start, or the port cannot be had.
    """
    if documents is None:
        documents = await asyncio.to_thread(DocumentStore.of_corpus, settings.corpus, settings.cache_folder)
    batcher = Batcher(backend)
    try:
        await backend.start()
        runner = await host(
            RetrievalApp(backend, documents, batcher, settings).application(), settings.host, settings.port
        )
    except BaseException:
        await backend.close()
        documents.close()
        raise
    batcher.start()
    return RunningServer(runner, settings.host, backend, documents, batcher)


def run(
    settings: ServerSettings,
    make: MakeBackend,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM, then return. One line is said once the server listens.

    Args:
        progress: called with (documents done, documents in all) while an index is built.
        say: how to say the line; None prints it.

    Raises:
        DataError, SearchServerError: as `serve`.
    """

    def describe(server: RunningServer) -> str:
        parts = settings.description(f"{server.backend.size:,} documents, {server.backend.version}")
        return f"{server.backend.kind} search server: {server.base_url}{SEARCH_PATH} ({parts}); Ctrl-C stops it"

    run_until_signal(
        # Here, where a signal interrupts it: a thread of the event loop would go on to the end of the corpus.
        lambda: DocumentStore.of_corpus(settings.corpus, settings.cache_folder, progress),
        lambda documents: serve(settings, make(settings.corpus, settings.cache_folder), documents),
        describe,
        say,
    )
