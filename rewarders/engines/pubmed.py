"""PubMed through NCBI's E-utilities (NBK25499), or any server that speaks its esearch.

One POST per search answers count and ids together. The query travels form-encoded in the body, so nothing
a model writes can become another parameter. No retries in here, and no redirects: every arrival upstream
is one the quota knows.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, ClassVar, Final
from urllib.parse import urlencode

from rewarders.engines.api_keys import key_from_environment, key_from_file, without_key
from rewarders.engines.base import SearchRequest, SearchResult
from rewarders.engines.eutils_reply import PUBMED_MAX_IDS, read_reply
from rewarders.engines.http import HttpEngine, HttpSettings
from rewarders.engines.permits import Permit, Slot, unlimited

NCBI_URL: Final = "https://eutils.ncbi.nlm.nih.gov"
_EUTILS_FOLDER: Final = "/entrez/eutils"
# esearch takes its date bounds only as a pair.
_OPEN_MIN_DATE: Final = "1800/01/01"
_OPEN_MAX_DATE: Final = "3000/12/31"
# Encoded here, which costs a third of what aiohttp takes for it.
_FORM_ENCODED: Final = {"Content-Type": "application/x-www-form-urlencoded"}
_CANARY: Final = SearchRequest(term="cancer", retmax=1)


class PubMedSettings(HttpSettings, frozen=True, kw_only=True):
    """How to reach an E-utilities service; see `HttpSettings`.

    base_url: host of the service, or the folder of its esearch.fcgi. tool, email: NCBI writes before it blocks.
    api_key_env: name of the environment variable that holds the API key; unset, blank or None: without key.
    api_key_file: file of mode 0600 that holds it, in place of that variable.
    more_api_keys_env: names of those of further keys. Requests under slots of the same rest share one key, so that the
    slots of the quota have to be the requests that one key may make times the number of keys.
    max_body_bytes: 9,999 ids take 130 kB.
    """

    base_url: str = NCBI_URL
    api_key_env: str | None = "NCBI_API_KEY"
    api_key_file: str | None = None
    more_api_keys_env: tuple[str, ...] = ()

    service: ClassVar[str] = "E-utilities"

    @property
    def esearch_url(self) -> str:
        """Where searches are posted; a bare host gets the folder NCBI uses."""
        return f"{self.folder(_EUTILS_FOLDER)}/esearch.fcgi"


class PubMedEngine(HttpEngine):
    """Client of esearch. The caller bounds concurrency."""

    def __init__(self, settings: PubMedSettings | None = None, *, permit: Permit = unlimited) -> None:
        self._settings = settings or PubMedSettings()
        super().__init__(self._settings, permit)
        self._url = self._settings.esearch_url

    async def search(self, request: SearchRequest) -> SearchResult:
        """Ask PubMed. At most three requests: an unexplained refusal is checked against a canary and
        asked once more.

        Raises BadQuery only if the service answers others while it refuses this query twice;
        EngineUnavailable for everything else that is not a complete result.
        """
        return await self._settle(lambda: self._ask(request))

    async def _probe(self) -> None:
        await self._prove_healthy(since=time.monotonic())

    async def _ask_canary(self) -> None:
        await self._ask(_CANARY)

    async def _ask(self, request: SearchRequest) -> SearchResult:
        """One HTTP request. Raises as `read_reply`, and EngineUnavailable for network trouble."""
        key = ""

        def options(slot: Slot) -> dict[str, Any]:
            nonlocal key
            form = self.form(request, slot.number)
            key = form.get("api_key", "")
            return {"data": urlencode(form).encode(), "headers": _FORM_ENCODED}

        def read(status: int, headers: Mapping[str, str], body: bytes) -> SearchResult:
            return read_reply(status, headers, without_key(body, key), request)

        return await self._request("POST", self._url, read, options)

    def form(self, request: SearchRequest, slot: int = 0) -> dict[str, str]:
        """The form fields of one esearch under slot number `slot`; retstart is left at 0 because PubMed gives its
        first 9,999 ids only.
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
        api_key = self._api_key(slot)
        if api_key:
            form["api_key"] = api_key
        return form

    def _api_key(self, slot: int) -> str:
        """Read where it is used, so that no object that might be printed or pickled holds it.

        Raises ApiKeyError if the file of a key has become unusable: asking without it would spend another quota.
        """
        names = (self._settings.api_key_env, *self._settings.more_api_keys_env)
        turn = slot % len(names)
        if turn == 0 and self._settings.api_key_file:
            return key_from_file(self._settings.api_key_file)
        return key_from_environment(names[turn])
