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
from dataclasses import dataclass, field
from typing import ClassVar, Final

from rewarders.engines.base import (
    BadQuery,
    EngineMisconfigured,
    EngineUnavailable,
    SearchRequest,
    SearchResult,
)
from rewarders.engines.ctgov_reply import MAX_PAGE_SIZE, RATE_LIMIT_WAIT_S, Page, read_page, read_version
from rewarders.engines.http import HttpEngine, HttpSettings
from rewarders.engines.permits import Permit, unlimited
from rewarders.engines.verdicts import Undecided

CTGOV_URL: Final = "https://clinicaltrials.gov"
_API_FOLDER: Final = "/api/v2"
# Orders by the names of `SearchRequest.sort`; any other sort the service takes may be written as it takes it.
_SORTS: Final = {"relevance": "@relevance", "pub_date": "StudyFirstPostDate:desc", "unsorted": ""}
_SORT: Final = re.compile(r"(?:[A-Za-z][A-Za-z0-9.]*|@relevance)(?::(?:asc|desc))?")
_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9]*")
# Empty pages are legal; this many more pages than full ones would take are too many.
_SPARE_PAGES: Final = 10

_CANARY: Final = SearchRequest(term="cancer", retmax=1, sort="unsorted")

Parameters = dict[str, str]


class CtGovSettings(HttpSettings, frozen=True, kw_only=True):
    """How to reach a ClinicalTrials.gov service; see `HttpSettings`.

    base_url: host of the service, or the folder that holds its `studies`. tool, email: the service turns away clients
    it takes for robots. timeout_s: deadline of one page. max_body_bytes: 1,000 ids take 90 kB. page_size: trials asked
    for at once, at most 1,000. date_field: what the dates of a request bound. version_ttl_s: seconds for which the time
    of the data is taken as known (it changes once on weekdays).
    """

    base_url: str = CTGOV_URL
    max_body_bytes: int = 4_000_000
    max_connections: int | None = 16
    page_size: int = MAX_PAGE_SIZE
    date_field: str = "StudyFirstPostDate"
    version_ttl_s: float = 600.0

    service: ClassVar[str] = "ClinicalTrials.gov"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.page_size <= MAX_PAGE_SIZE:
            raise ValueError(f"page_size must be 1 to {MAX_PAGE_SIZE}, got {self.page_size}")
        if not _NAME.fullmatch(self.date_field):
            raise ValueError(f"date_field must be the name of a field such as StartDate, got {self.date_field!r}")

    @property
    def api_url(self) -> str:
        """The folder of the API; a bare host gets the one the service uses."""
        return self.folder(_API_FOLDER)


class CtGovEngine(HttpEngine):
    """Client of /studies and /version."""

    throttled_wait_s = RATE_LIMIT_WAIT_S

    def __init__(self, settings: CtGovSettings | None = None, *, permit: Permit = unlimited) -> None:
        self._settings = settings or CtGovSettings()
        super().__init__(self._settings, permit)
        self._studies_url = f"{self._settings.api_url}/studies"
        self._version_url = f"{self._settings.api_url}/version"
        self._version_lock = asyncio.Lock()
        self._version_at = float("-inf")
        self.data_timestamp: str | None = None

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
        walk.add(await self._settle(lambda: self._ask_page(parameters)))
        while walk.token is not None and not walk.finished:
            try:
                walk.add(await self._ask_page({**parameters, "pageToken": walk.token}))
            except (BadQuery, Undecided) as refusal:
                # The first page was given, so the query is good.
                raise EngineUnavailable(f"a later page was refused: {refusal.reason}") from None
        return walk.result()

    # Requests.

    async def _probe(self) -> None:
        await self._ask_version()

    async def _ask_canary(self) -> None:
        await self._ask_page(self._parameters(_CANARY))

    async def _ask_page(self, parameters: Parameters) -> Page:
        return await self._request("GET", self._studies_url, read_page, lambda _: {"params": parameters})

    async def _ask_version(self) -> str:
        asked_at = time.monotonic()
        try:
            self.data_timestamp = await self._request("GET", self._version_url, read_version, is_search=False)
        except (BadQuery, Undecided) as error:
            raise EngineUnavailable(f"the version is refused: {error.reason}") from None
        self._version_at = asked_at
        return self.data_timestamp

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
