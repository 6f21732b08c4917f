"""PubMed through NCBI's E-utilities (NBK25499), or any server that speaks its esearch.

One POST per search answers count and ids together. The query travels form-encoded in the body, so nothing
a model writes can become another parameter. No retries in here, and no redirects: every arrival upstream
is one the quota knows.
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import Final
from urllib.parse import urlsplit

import aiohttp
import msgspec

from rewarders.engines.base import (
    BadQuery,
    EngineThrottled,
    EngineUnavailable,
    SearchEngine,
    SearchRequest,
    SearchResult,
)
from rewarders.engines.eutils_reply import PUBMED_MAX_IDS, Undecided, read_reply
from rewarders.engines.permits import Permit, body_refused, head_arrived, sending_trace, unlimited

NCBI_URL: Final = "https://eutils.ncbi.nlm.nih.gov"
_EUTILS_FOLDER: Final = "/entrez/eutils"
# esearch takes its date bounds only as a pair.
_OPEN_MIN_DATE: Final = "1800/01/01"
_OPEN_MAX_DATE: Final = "3000/12/31"
_CANARY: Final = SearchRequest(term="cancer", retmax=1)


class PubMedSettings(msgspec.Struct, frozen=True):
    """How to reach an E-utilities service.

    base_url: host of the service, or the folder of its esearch.fcgi. tool, email: who is asking (NCBI
    writes before it blocks). api_key_env: name of the environment variable that holds the API key; unset,
    blank or None: without key. timeout_s: deadline of one request from the first byte sent to the last
    received, waiting for the quota not included. connect_timeout_s: deadline of opening a connection.
    max_body_bytes: longer answers are refused (9,999 ids take 130 kB).
    """

    base_url: str = NCBI_URL
    tool: str = "deepretrieval"
    email: str | None = None
    api_key_env: str | None = "NCBI_API_KEY"
    timeout_s: float = 20.0
    connect_timeout_s: float = 5.0
    max_body_bytes: int = 8_000_000

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"the E-utilities address must start with http:// or https://, got {self.base_url!r}")

    @property
    def esearch_url(self) -> str:
        """Where searches are posted; a bare host gets the folder NCBI uses."""
        folder = self.base_url.rstrip("/")
        if not urlsplit(folder).path:
            folder += _EUTILS_FOLDER
        return f"{folder}/esearch.fcgi"


class PubMedEngine(SearchEngine):
    """Client of esearch. `permit()` is entered around every HTTP request: put the quota there."""

    def __init__(self, settings: PubMedSettings | None = None, *, permit: Permit = unlimited) -> None:
        self._settings = settings or PubMedSettings()
        self._permit = permit
        self._url = self._settings.esearch_url
        self._session: aiohttp.ClientSession | None = None
        self._canary_lock = asyncio.Lock()
        # When the last request that was answered properly had left: seconds of the monotonic clock.
        self._healthy_at = float("-inf")
        self.requests_sent = 0

    async def start(self) -> None:
        """Open the keep-alive session. No request is made."""
        timeout = aiohttp.ClientTimeout(total=self._settings.timeout_s, sock_connect=self._settings.connect_timeout_s)
        self._session = aiohttp.ClientSession(
            # The caller bounds concurrency: in a full pool, requests would wait while they hold a quota slot.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30.0),
            timeout=timeout,
            headers={"User-Agent": f"{self._settings.tool} (asynchronous search client)"},
            cookie_jar=aiohttp.DummyCookieJar(),
            trace_configs=[sending_trace()],
        )

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def check(self) -> None:
        """Ask the canary query. Raises EngineUnavailable, naming the address, if that fails."""
        try:
            await self._ask_canary()
        except EngineUnavailable as error:
            raise type(error)(f"{self._settings.base_url}: {error.reason}", error.retry_after_s) from None

    async def search(self, request: SearchRequest) -> SearchResult:
        """Ask PubMed. At most three requests: an unexplained refusal is checked against a canary and
        asked once more.

        Raises BadQuery only if the service answers others while it refuses this query twice;
        EngineUnavailable for everything else that is not a complete result.
        """
        try:
            return await self._ask(request)
        except Undecided:
            await self._prove_healthy(since=time.monotonic())
        try:
            return await self._ask(request)
        except Undecided as refusal:
            raise BadQuery(refusal.reason) from None

    async def _prove_healthy(self, since: float) -> None:
        """Return once a request sent after `since` has been answered properly; raise EngineUnavailable if
        it fails.

        Concurrent refusals share one canary, and any other search that succeeded meanwhile saves it.
        """
        async with self._canary_lock:
            if self._healthy_at >= since:
                return
            await self._ask_canary()

    async def _ask_canary(self) -> None:
        try:
            await self._ask(_CANARY)
        except (Undecided, BadQuery) as error:
            raise EngineUnavailable(f"search backend down: even a canary query fails ({error})") from None

    async def _ask(self, request: SearchRequest) -> SearchResult:
        """One HTTP request. Raises as `read_reply`, and EngineUnavailable for network trouble."""
        if self._session is None:
            raise EngineUnavailable("the client is closed")
        form = self._form(request)
        async with self._permit() as slot:
            sent_at = time.monotonic()
            self.requests_sent += 1
            try:
                sending = self._session.post(self._url, data=form, allow_redirects=False, trace_request_ctx=slot)
                async with sending as response:
                    head_arrived(slot, response.status, response.headers)
                    body = await self._read_body(response)
            except TimeoutError:
                raise EngineUnavailable(f"no answer within {self._settings.timeout_s:g} s") from None
            except (aiohttp.ClientError, OSError, ValueError) as error:
                # The class says what happened; the text of some of these quotes the request.
                raise EngineUnavailable(f"network error ({type(error).__name__})") from None
        try:
            result = read_reply(response.status, response.headers, body, request)
        except EngineThrottled as error:
            body_refused(slot, response.status, error)
            raise
        self._healthy_at = max(self._healthy_at, sent_at)
        return result

    async def _read_body(self, response: aiohttp.ClientResponse) -> bytes:
        body = bytearray()
        async for chunk in response.content.iter_chunked(65_536):
            body += chunk
            if len(body) > self._settings.max_body_bytes:
                raise EngineUnavailable(f"answer longer than {self._settings.max_body_bytes} bytes")
        return bytes(body)

    def _form(self, request: SearchRequest) -> dict[str, str]:
        """The form fields of one esearch; retstart is left at 0 because PubMed gives its first 9,999 ids
        only.
        """
        form = {
            "db": "pubmed",
            "term": request.term,
            "retmode": "json",
            "retmax": str(min(request.retmax, PUBMED_MAX_IDS)),
            "sort": request.sort,
            "tool": self._settings.tool,
        }
        if request.min_date or request.max_date:
            form["datetype"] = "pdat"
            form["mindate"] = request.min_date or _OPEN_MIN_DATE
            form["maxdate"] = request.max_date or _OPEN_MAX_DATE
        if self._settings.email:
            form["email"] = self._settings.email
        api_key = self._api_key()
        if api_key:
            form["api_key"] = api_key
        return form

    def _api_key(self) -> str:
        """Read where it is used, so that no object that might be printed or pickled holds it."""
        name = self._settings.api_key_env
        return os.environ.get(name, "").strip() if name else ""
