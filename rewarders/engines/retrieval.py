"""Client of a retrieval server (`rewarders.servers.retrieval`): BM25 or dense, over a corpus of our own.

Searches that wait while requests are on their way travel together in the next request, so that thousands of searches in
flight cost a few connections. No retries in here.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque

import aiohttp
import msgspec

from rewarders.engines.base import BadQuery, EngineUnavailable, SearchEngine, SearchRequest, SearchResult
from rewarders.engines.connections import connector
from rewarders.engines.permits import Permit, unlimited
from rewarders.engines.retrieval_wire import (
    CONTENT_TYPE,
    MAX_K,
    MAX_SEARCHES,
    MAX_TERM_CHARACTERS,
    RM3_SORT,
    SEARCH_PATH,
    VERSION_PATH,
    Answer,
    Answers,
    Found,
    Refused,
    Search,
    Searches,
    Version,
)


class RetrievalSettings(msgspec.Struct, frozen=True):
    """How to reach a retrieval server.

    base_url: where it listens. timeout_s: deadline of one request, from the first byte sent to the last received.
    connect_timeout_s: deadline of opening a connection. max_requests: requests on their way at once; one is searched
    while the next waits at the server. max_searches: searches in one request, at most 256. max_documents, max_texts:
    documents that the searches of one request ask for together, without and with texts (one search may ask for more).
    max_body_bytes: longer answers are refused. version_ttl_s: seconds for which the server's data are taken as known.
    """

    base_url: str
    timeout_s: float = 20.0
    connect_timeout_s: float = 5.0
    max_requests: int = 4
    max_searches: int = 64
    max_documents: int = 100_000
    max_texts: int = 10_000
    max_body_bytes: int = 1 << 28
    version_ttl_s: float = 60.0

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"the search server's address must start with http:// or https://: {self.base_url!r}")
        if self.max_requests < 1 or not 1 <= self.max_searches <= MAX_SEARCHES:
            raise ValueError(f"max_requests must be at least 1 and max_searches 1 to {MAX_SEARCHES}")


class _Waiting(msgspec.Struct):
    """One search and who waits for its answer: bytes, decoded by the one who waits."""

    search: Search
    answer: asyncio.Future[msgspec.Raw | EngineUnavailable]


class RetrievalEngine(SearchEngine):
    """Searches through a retrieval server. Dates and sort of a request are ignored: the server ranks, and has no dates.

    permit: entered around every HTTP request, which may hold many searches.
    """

    def __init__(self, settings: RetrievalSettings, *, permit: Permit = unlimited) -> None:
        self._settings = settings
        self._permit = permit
        self._url = settings.base_url.rstrip("/")
        self._session: aiohttp.ClientSession | None = None
        self._waiting: deque[_Waiting] = deque()
        self._requests: set[asyncio.Task[None]] = set()
        self._encoder = msgspec.msgpack.Encoder()
        self._reply: msgspec.msgpack.Decoder[Answers] = msgspec.msgpack.Decoder(Answers)
        self._answer: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)
        self._version_lock = asyncio.Lock()
        self._version = ""
        self._version_at = float("-inf")
        self.requests_sent = 0

    async def start(self) -> None:
        """Open the keep-alive session. No request is made."""
        timeout = aiohttp.ClientTimeout(total=self._settings.timeout_s, sock_connect=self._settings.connect_timeout_s)
        self._session = aiohttp.ClientSession(
            connector=connector(self._url, None if self._permit is unlimited else self._settings.timeout_s),
            timeout=timeout,
            headers={"Content-Type": CONTENT_TYPE},
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def close(self) -> None:
        session, self._session = self._session, None
        for task in self._requests:
            task.cancel()
        await asyncio.gather(*self._requests, return_exceptions=True)
        self._fail(self._waiting, EngineUnavailable("the client is closed"))
        self._waiting.clear()
        if session is not None:
            await session.close()

    async def check(self) -> None:
        """Ask for the version. Raises EngineUnavailable, naming the address, if that fails."""
        try:
            await self._ask_version()
        except EngineUnavailable as error:
            raise type(error)(f"{self._url}: {error.reason}", error.retry_after_s) from None

    async def data_version(self) -> str:
        """Corpus, index and settings of the server. Every reply says it too, so it is rarely asked for.

        Raises EngineUnavailable.
        """
        async with self._version_lock:
            if time.monotonic() - self._version_at >= self._settings.version_ttl_s:
                await self._ask_version()
            return self._version

    async def search(self, request: SearchRequest) -> SearchResult:
        """Ask the server. Raises BadQuery for a query it refuses, EngineUnavailable for everything else."""
        answer = await self._ask(_search_of(request))
        if isinstance(answer, EngineUnavailable):  # many wait for one request: each raises its own
            raise EngineUnavailable(answer.reason, answer.retry_after_s)
        try:
            decoded = self._answer.decode(answer)
        except msgspec.DecodeError as error:
            raise EngineUnavailable(f"malformed answer: {error}") from None
        if isinstance(decoded, Refused):
            raise BadQuery(decoded.reason)
        if not isinstance(decoded, Found):
            raise EngineUnavailable(decoded.reason)
        return _result_of(decoded, request)

    # Requests.

    async def _ask(self, search: Search) -> msgspec.Raw | EngineUnavailable:
        if self._session is None:
            raise EngineUnavailable("the client is closed")
        waiting = _Waiting(search, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        if len(self._requests) < self._settings.max_requests:
            task = asyncio.create_task(self._send_all())
            self._requests.add(task)
            task.add_done_callback(self._requests.discard)
        return await waiting.answer

    async def _send_all(self) -> None:
        """Send what waits, one request after the other, until nothing does."""
        await asyncio.sleep(0)  # those who begin to wait in this turn of the loop come along
        while batch := self._next_batch():
            try:
                answers = await self._send(batch)
            except EngineUnavailable as error:
                self._fail(batch, error)
            except asyncio.CancelledError:
                self._fail(batch, EngineUnavailable("the client is closed"))
                raise
            else:
                for waiting, answer in zip(batch, answers, strict=True):
                    if not waiting.answer.done():
                        waiting.answer.set_result(answer)

    def _next_batch(self) -> list[_Waiting]:
        """The longest waiting searches, as many as may travel together."""
        used = self._settings
        batch: list[_Waiting] = []
        share = 0.0
        while self._waiting and len(batch) < used.max_searches:
            search = self._waiting[0].search
            share += search.k / (used.max_texts if search.texts else used.max_documents)
            if share > 1.0 and batch:
                break
            waiting = self._waiting.popleft()
            if not waiting.answer.done():  # cancelled since
                batch.append(waiting)
        return batch

    async def _send(self, batch: list[_Waiting]) -> list[msgspec.Raw]:
        body = self._encoder.encode(Searches([waiting.search for waiting in batch]))
        async with self._permit() as slot:
            if self._session is None:
                raise EngineUnavailable("the client is closed")
            self.requests_sent += 1
            try:
                async with self._session.post(self._url + SEARCH_PATH, data=body, allow_redirects=False) as response:
                    slot.replied()
                    _require_ok(response)
                    received = await self._read_body(response)
            except TimeoutError:
                raise EngineUnavailable(f"no answer within {self._settings.timeout_s:g} s") from None
            except (aiohttp.ClientError, OSError, ValueError) as error:
                raise EngineUnavailable(f"network error ({type(error).__name__})") from None
        return self._answers(received, len(batch))

    def _answers(self, body: bytes, due: int) -> list[msgspec.Raw]:
        try:
            reply = self._reply.decode(body)
        except msgspec.DecodeError as error:
            raise EngineUnavailable(f"malformed reply: {error}") from None
        if len(reply.answers) != due:
            raise EngineUnavailable(f"malformed reply: {len(reply.answers)} answers to {due} searches")
        self._version, self._version_at = reply.version, time.monotonic()
        return reply.answers

    async def _read_body(self, response: aiohttp.ClientResponse) -> bytes:
        length = response.content_length
        if length is None or length > self._settings.max_body_bytes:
            raise EngineUnavailable(f"an answer of {length} bytes, where {self._settings.max_body_bytes} are allowed")
        return await response.read()

    async def _ask_version(self) -> None:
        if self._session is None:
            raise EngineUnavailable("the client is closed")
        try:
            async with self._session.get(self._url + VERSION_PATH, allow_redirects=False) as response:
                _require_ok(response)
                version = msgspec.json.decode(await self._read_body(response), type=Version)
        except TimeoutError:
            raise EngineUnavailable(f"no answer within {self._settings.timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise EngineUnavailable(f"no search server answers ({type(error).__name__})") from None
        self._version, self._version_at = version.version, time.monotonic()

    @staticmethod
    def _fail(batch: list[_Waiting] | deque[_Waiting], error: EngineUnavailable) -> None:
        for waiting in batch:
            if not waiting.answer.done():
                waiting.answer.set_result(error)


def _search_of(request: SearchRequest) -> Search:
    """Raises BadQuery for a query that no request can carry."""
    if len(request.term) > MAX_TERM_CHARACTERS:
        raise BadQuery(f"the query is longer than {MAX_TERM_CHARACTERS:,} characters")
    try:
        request.term.encode()
    except UnicodeEncodeError:
        raise BadQuery("the query is not valid Unicode text") from None
    return Search(request.term, min(request.retmax, MAX_K), request.with_texts, request.sort == RM3_SORT)


def _result_of(found: Found, request: SearchRequest) -> SearchResult:
    """Raises EngineUnavailable for an answer that cannot be the one to this request."""
    columns = [column for column in (found.texts, found.titles) if column is not None]
    if len(found.ids) > request.retmax or any(len(column) != len(found.ids) for column in columns):
        raise EngineUnavailable("malformed answer: ids, texts and titles do not fit together")
    if request.with_texts and len(columns) < 2:
        raise EngineUnavailable("malformed answer: the texts are missing")
    return SearchResult(found.ids, max(found.count, len(found.ids)), texts=found.texts, titles=found.titles)


def _require_ok(response: aiohttp.ClientResponse) -> None:
    if response.status == 200:
        return
    wait = response.headers.get("Retry-After", "")
    retry_after_s = float(wait) if wait.replace(".", "", 1).isdecimal() else None
    raise EngineUnavailable(f"status {response.status} from the search server", retry_after_s)
