"""ClinicalTrials.gov through its API v2, or any server that speaks it.

One search is a GET of /studies for each page of up to 1,000 trials, ids only. Every page is a request like any
other: it takes a permit of its own and has its own deadline. The query travels as one encoded parameter, so nothing a
model writes can become another one. No retries in here, and no redirects: every arrival upstream is one the quota
knows.

Dates: the original DeepRetrieval bounds publications but not trials, so its trial task sends requests without dates
and none are sent here either. Where a request has dates, they bound `CtGovSettings.date_field`, by default the day the
record was first public: what a reader of that day could have found. The service ignores filters for a query of NCT
ids only.
"""

from __future__ import annotations

import asyncio
import calendar
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, TypeVar
from urllib.parse import urlsplit

import aiohttp
import msgspec

from rewarders.engines.base import (
    BadQuery,
    EngineMisconfigured,
    EngineUnavailable,
    SearchEngine,
    SearchRequest,
    SearchResult,
)
from rewarders.engines.ctgov_reply import MAX_PAGE_SIZE, RATE_LIMIT_WAIT_S, Page, read_page, read_version
from rewarders.engines.eutils_reply import Undecided
from rewarders.engines.permits import Permit, head_arrived, sending_trace, unlimited

CTGOV_URL: Final = "https://clinicaltrials.gov"
_API_FOLDER: Final = "/api/v2"
# Orders by the names of `SearchRequest.sort`; any other sort the service takes may be written as it takes it.
_SORTS: Final = {"relevance": "@relevance", "pub_date": "StudyFirstPostDate:desc", "unsorted": ""}
_SORT: Final = re.compile(r"(?:[A-Za-z][A-Za-z0-9.]*|@relevance)(?::(?:asc|desc))?")
_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9]*")
# Empty pages are legal; this many more pages than full ones would take are too many.
_SPARE_PAGES: Final = 10

Parameters = dict[str, str]
T = TypeVar("T")
Reader = Callable[[int, Mapping[str, str], bytes], T]


class CtGovSettings(msgspec.Struct, frozen=True):
    """How to reach a ClinicalTrials.gov service.

    base_url: host of the service, or the folder that holds its `studies`. tool, email: who is asking; both are sent
    as User-Agent, because the service turns away clients it takes for robots. timeout_s: deadline of one page from the
    first byte sent to the last received, waiting for the quota not included. connect_timeout_s: deadline of opening a
    connection. max_body_bytes: longer answers are refused (1,000 ids take 90 kB). max_connections: requests in flight;
    the others wait before they ask for a permit. page_size: trials asked for at once, at most 1,000. date_field: what
    the dates of a request bound. version_ttl_s: seconds for which the time of the data is taken as known (it changes
    once on weekdays).
    """

    base_url: str = CTGOV_URL
    tool: str = "deepretrieval"
    email: str | None = None
    timeout_s: float = 20.0
    connect_timeout_s: float = 5.0
    max_body_bytes: int = 4_000_000
    max_connections: int = 16
    page_size: int = MAX_PAGE_SIZE
    date_field: str = "StudyFirstPostDate"
    version_ttl_s: float = 600.0

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"the ClinicalTrials.gov address must start with http:// or https://: {self.base_url!r}")
        if "@" in urlsplit(self.base_url).netloc:
            raise ValueError("the ClinicalTrials.gov address must not hold a user or password: errors quote it")
        if not 1 <= self.page_size <= MAX_PAGE_SIZE:
            raise ValueError(f"page_size must be 1 to {MAX_PAGE_SIZE}, got {self.page_size}")
        if self.max_connections < 1:
            raise ValueError(f"max_connections must be at least 1, got {self.max_connections}")
        if not _NAME.fullmatch(self.date_field):
            raise ValueError(f"date_field must be the name of a field such as StartDate, got {self.date_field!r}")
        if not self.user_agent.isprintable() or not self.user_agent.isascii():
            raise ValueError("tool and email must be printable ASCII: they are sent as a header")

    @property
    def api_url(self) -> str:
        """The folder of the API; a bare host gets the one the service uses."""
        folder = self.base_url.rstrip("/")
        return folder if urlsplit(folder).path else folder + _API_FOLDER

    @property
    def user_agent(self) -> str:
        contact = f"; {self.email}" if self.email else ""
        return f"{self.tool} (asynchronous search client{contact})"


class CtGovEngine(SearchEngine):
    """Client of /studies. `permit()` is entered around every HTTP request: put the quota there."""

    def __init__(self, settings: CtGovSettings | None = None, *, permit: Permit = unlimited) -> None:
        self._settings = settings or CtGovSettings()
        self._permit = permit
        self._session: aiohttp.ClientSession | None = None
        self._connections = asyncio.Semaphore(self._settings.max_connections)
        self._canary_lock = asyncio.Lock()
        self._version_lock = asyncio.Lock()
        self._version_at = float("-inf")
        # When the last request that was answered properly had left: seconds of the monotonic clock.
        self._healthy_at = float("-inf")
        self.data_timestamp: str | None = None
        self.requests_sent = 0

    async def start(self) -> None:
        """Open the keep-alive session. No request is made."""
        timeout = aiohttp.ClientTimeout(total=self._settings.timeout_s, sock_connect=self._settings.connect_timeout_s)
        self._session = aiohttp.ClientSession(
            # Bounded by the semaphore alone: in a full pool, requests would wait while they hold a quota slot.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30.0),
            timeout=timeout,
            headers={"User-Agent": self._settings.user_agent, "Accept": "application/json"},
            cookie_jar=aiohttp.DummyCookieJar(),
            trace_configs=[sending_trace()],
            middlewares=(_never_send_twice,),
        )

    async def close(self) -> None:
        session, self._session = self._session, None  # gone at once, so that nobody else starts a request
        if session is not None:
            await session.close()

    async def check(self) -> None:
        """Ask for the version. Raises EngineUnavailable, naming the address, if that fails."""
        try:
            await self._ask_version()
        except EngineUnavailable as error:
            raise type(error)(f"{self._settings.base_url}: {error.reason}", error.retry_after_s) from None

    async def data_version(self) -> str:
        """The time of the service's data, which belongs to the identity of every answer: put it into cache keys.

        Asked for at most once in `version_ttl_s` seconds, by one request for all who wait. Raises EngineUnavailable.
        """
        async with self._version_lock:
            if self.data_timestamp is None or time.monotonic() - self._version_at >= self._settings.version_ttl_s:
                return await self._ask_version()
            return self.data_timestamp

    async def search(self, request: SearchRequest) -> SearchResult:
        """Ask for all pages that `retmax` needs, one after the other (the service gives each page's token with the
        page before it). An unexplained refusal of the first page is checked against a canary and asked once more.

        Raises BadQuery only for a refusal that names the query, or if the service answers others while it refuses
        this one twice; EngineUnavailable for everything else that is not a complete result.
        """
        parameters = self._parameters(request)
        walk = _Walk(request.retmax, int(parameters["pageSize"]))
        walk.add(await self._first_page(parameters))
        while walk.token is not None and not walk.finished:
            try:
                walk.add(await self._ask_page({**parameters, "pageToken": walk.token}))
            except (BadQuery, Undecided) as refusal:
                # The first page was given, so the query is good.
                raise EngineUnavailable(f"a later page was refused: {refusal.reason}") from None
        return walk.result()

    async def _first_page(self, parameters: Parameters) -> Page:
        try:
            return await self._ask_page(parameters)
        except Undecided:
            await self._prove_healthy(since=time.monotonic())
        try:
            return await self._ask_page(parameters)
        except Undecided as refusal:
            raise BadQuery(refusal.reason) from None

    async def _prove_healthy(self, since: float) -> None:
        """Return once a search sent after `since` has been answered properly; raise EngineUnavailable if it fails.

        Concurrent refusals share one canary, and any other search that succeeded meanwhile saves it.
        """
        async with self._canary_lock:
            if self._healthy_at >= since:
                return
            try:
                await self._ask_page(self._parameters(SearchRequest(term="cancer", retmax=1, sort="unsorted")))
            except (Undecided, BadQuery) as error:
                raise EngineUnavailable(f"even a canary query fails: {error.reason}") from None

    # Requests.

    async def _ask_page(self, parameters: Parameters) -> Page:
        return await self._get("studies", parameters, read_page)

    async def _ask_version(self) -> str:
        asked_at = time.monotonic()
        try:
            self.data_timestamp = await self._get("version", {}, read_version)
        except (BadQuery, Undecided) as error:
            raise EngineUnavailable(f"the version is refused: {error.reason}") from None
        self._version_at = asked_at
        return self.data_timestamp

    async def _get(self, path: str, parameters: Parameters, read: Reader[T]) -> T:
        """One HTTP request. Raises as `read`, and EngineUnavailable for network trouble."""
        url = f"{self._settings.api_url}/{path}"
        async with self._connections, self._permit() as slot:
            if self._session is None:
                raise EngineUnavailable("the client is closed")
            sent_at = time.monotonic()
            self.requests_sent += 1
            try:
                sending = self._session.get(url, params=parameters, allow_redirects=False, trace_request_ctx=slot)
                async with sending as response:
                    head_arrived(slot, response.status, response.headers, RATE_LIMIT_WAIT_S)
                    body = await self._read_body(response)
            except TimeoutError:
                raise EngineUnavailable(f"no answer within {self._settings.timeout_s:g} s") from None
            except (aiohttp.ClientError, OSError, ValueError) as error:
                # The class says what happened; the text of some of these quotes the request.
                raise EngineUnavailable(f"network error ({type(error).__name__})") from None
        answer = read(response.status, response.headers, body)
        self._healthy_at = max(self._healthy_at, sent_at)
        return answer

    async def _read_body(self, response: aiohttp.ClientResponse) -> bytes:
        body = bytearray()
        async for chunk in response.content.iter_chunked(65_536):
            body += chunk
            if len(body) > self._settings.max_body_bytes:
                raise EngineUnavailable(f"answer longer than {self._settings.max_body_bytes} bytes")
        return bytes(body)

    def _parameters(self, request: SearchRequest) -> Parameters:
        """The parameters of the first page. Raises BadQuery for a query the service would read as no query at all,
        which it answers with every trial it has.
        """
        if not any(character.isalnum() for character in request.term):
            raise BadQuery("the query holds no word")
        if not _is_utf8(request.term):
            raise BadQuery("the query holds characters that no request can carry")
        parameters = {
            "query.term": request.term,
            "fields": "NCTId",
            "pageSize": str(min(request.retmax, self._settings.page_size)),
            "countTotal": "true",
        }
        sort = _SORTS.get(request.sort, request.sort)
        if sort:
            if not _SORT.fullmatch(sort):
                known = ", ".join(_SORTS)
                raise EngineMisconfigured(f"no such sort: {request.sort!r} (use {known}, or a field as Field:desc)")
            parameters["sort"] = sort
        if request.min_date or request.max_date:
            parameters["filter.advanced"] = _date_filter(self._settings.date_field, request)
        return parameters


async def _never_send_twice(
    request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
) -> aiohttp.ClientResponse:
    """aiohttp sends a GET again, unasked, when its connection breaks: an arrival upstream that no permit covers. It
    does so for its own errors only, so they leave here as ours.
    """
    try:
        return await handler(request)
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
        raise EngineUnavailable(f"network error ({type(error).__name__})") from None


@dataclass
class _Walk:
    """The pages of one search, and whether they are complete."""

    retmax: int
    page_size: int
    total: int = 0
    received: int = 0
    pages: int = 0
    token: str | None = None
    ids: dict[str, None] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return len(self.ids) >= self.retmax or self.received >= self.total

    def add(self, page: Page) -> None:
        """Raises EngineUnavailable if the count is missing, or the pages do not come to an end."""
        if self.pages == 0:
            if page.total is None:
                raise EngineUnavailable("malformed result: totalCount is missing")
            self.total = page.total
        elif page.next_token is not None and page.next_token == self.token:
            raise EngineUnavailable("a page names itself as the next one")
        self.pages += 1
        if self.pages > -(-self.total // self.page_size) + _SPARE_PAGES:
            raise EngineUnavailable(f"{self.pages} pages for {self.total} trials: paging does not end")
        self.received += len(page.ids)
        self.ids.update(dict.fromkeys(page.ids))
        self.token = page.next_token

    def result(self) -> SearchResult:
        """The answer. Raises EngineUnavailable if trials are missing or too many: the data changed between two pages,
        or an answer was incomplete.
        """
        if self.received > self.total or not self.finished:
            raise EngineUnavailable(f"inconsistent result: {self.received} trials received where {self.total} are due")
        twice = self.received - len(self.ids)
        warnings = (f"{twice} trials were sent twice",) if twice else ()
        return SearchResult(ids=tuple(self.ids)[: self.retmax], count=self.total, warnings=warnings)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _date_filter(date_field: str, request: SearchRequest) -> str:
    first = _day(request.min_date, last=False) if request.min_date else "MIN"
    final = _day(request.max_date, last=True) if request.max_date else "MAX"
    return f"AREA[{date_field}]RANGE[{first},{final}]"


def _day(date: str, *, last: bool) -> str:
    """The first or last day of YYYY, YYYY/MM or YYYY/MM/DD as YYYY-MM-DD; a day past the end of its month is its end.

    Raises EngineMisconfigured for a month or day that no year has: dates come from the data, not from a query.
    """
    year, month, day = ([int(part) for part in date.split("/")] + [0, 0])[:3]
    month = month or (12 if last else 1)
    if not 1 <= month <= 12 or not 0 <= day <= 31 or not 1 <= year <= 9999:
        raise EngineMisconfigured(f"{date!r} is no date: write YYYY, YYYY/MM or YYYY/MM/DD")
    end = calendar.monthrange(year, month)[1]
    return f"{year:04d}-{month:02d}-{min(day or (end if last else 1), end):02d}"
