"""Reading an esearch answer of NCBI's E-utilities: a result, or whose fault it is that there is none.

Pure: bytes in, verdict out. Many failures of E-utilities come with HTTP status 200, and one prefix,
"Search Backend failed", stands both for a wrong query and for an outage at NCBI; what the text does not
decide is `Undecided`, and the client settles it by asking something that cannot be wrong. Bodies may hold
the API key or the caller's address, so no message made here quotes anything but the ERROR text of
esearch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from rewarders.engines.base import (
    BadQuery,
    EngineMisconfigured,
    EngineUnavailable,
    SearchRequest,
    SearchResult,
)
from rewarders.engines.verdicts import Undecided, retry_after_seconds

PUBMED_MAX_IDS: Final = 9999
DEFAULT_RETRY_AFTER_S: Final = 2.0
_MAX_DETAIL_CHARS: Final = 200

# Texts of real incidents at NCBI (2025-07-04 and earlier), in lower case. Narrow on purpose: an ERROR may
# quote the query, and a model must not be able to pass off its own syntax error as an outage. The rest is for
# the canary.
_OUTAGE_SIGNS: Final = (
    "couldn't resolve #",
    "unable to open connection to #",
    "address table is empty",
    "database is not supported",
)
_CALLER_SIGNS: Final = (
    "invalid db name specified",
    "'retstart' cannot be larger",
    "unable to obtain query #",
)
_XML_ERROR: Final = re.compile(rb"<ERROR>(.*?)</ERROR>", re.DOTALL | re.IGNORECASE)


def read_reply(status: int, headers: Mapping[str, str], body: bytes, request: SearchRequest) -> SearchResult:
    """Turn one HTTP answer to `request` (retstart 0) into a result.

    headers: looked up case-insensitively if the mapping does so, as aiohttp's does.
    Raises BadQuery, EngineUnavailable, EngineMisconfigured or Undecided.
    """
    document = _load_json(body)
    _raise_for_service_error(status, headers, document)
    _raise_for_status(status, headers)
    if document is None:
        _raise_for_foreign_body(body, request.term)
    answer = document.get("esearchresult") if isinstance(document, dict) else None
    if not isinstance(answer, dict):
        raise EngineUnavailable("the answer holds no esearchresult")
    error = answer.get("ERROR")
    if error:
        raise_for_error_text(str(error), request.term)
    return _read_result(answer, request)


def raise_for_error_text(text: str, term: str) -> None:
    """Classify the ERROR text of esearch to a search for `term`. Always raises."""
    lowered = text.lower().replace(term.lower(), "")
    detail = " ".join(text.split())[:_MAX_DETAIL_CHARS]
    if any(sign in lowered for sign in _OUTAGE_SIGNS):
        raise EngineUnavailable(f"search backend down: {detail}")
    if lowered.startswith("empty term"):
        raise BadQuery("empty term")
    if any(sign in lowered for sign in _CALLER_SIGNS):
        raise EngineMisconfigured(f"the request is refused: {detail}")
    raise Undecided(detail)


def _load_json(body: bytes) -> Any:
    """The decoded body, or None if it is not JSON. Lenient about raw control characters, which NCBI's
    texts contain: the fast decoder is not.
    """
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    try:
        return json.loads(body.decode("utf-8"), strict=False)
    except (ValueError, RecursionError):
        return None


def _raise_for_service_error(status: int, headers: Mapping[str, str], document: Any) -> None:
    """The gateway in front of E-utilities answers {"error": …}; the rate limit has been seen under status
    200 too.
    """
    error = document.get("error") if isinstance(document, dict) else None
    lowered = error.lower() if isinstance(error, str) else ""
    if status == 429 or "rate limit" in lowered:
        wait = retry_after_seconds(headers.get("Retry-After"))
        raise EngineUnavailable("rate limit exceeded", DEFAULT_RETRY_AFTER_S if wait is None else wait)
    if "api key" in lowered:
        raise EngineMisconfigured("the API key is refused: correct or unset its environment variable")
    if error is not None and status == 200:
        raise EngineUnavailable("the service answered with an error instead of a result")


def _raise_for_status(status: int, headers: Mapping[str, str]) -> None:
    if status == 200:
        return
    wait = retry_after_seconds(headers.get("Retry-After"))
    if status in (413, 414):
        raise BadQuery(f"query too long for the engine (HTTP {status})")
    if status in (301, 302, 303, 307, 308):
        raise EngineMisconfigured(f"the engine's address redirects (HTTP {status}): set the address it moved to")
    if status in (401, 404, 405):
        raise EngineMisconfigured(f"no search service there (HTTP {status}): check the engine's address")
    if status in (400, 422):
        raise Undecided(f"request refused (HTTP {status})")
    raise EngineUnavailable(f"HTTP {status}", wait)


def _raise_for_foreign_body(body: bytes, term: str) -> None:
    """Status 200 and no JSON: an XML error, an HTML page of a gateway, or an answer cut short. Always
    raises.
    """
    error = _XML_ERROR.search(body)
    if error:
        raise_for_error_text(error.group(1).decode("utf-8", "replace"), term)
    start = body[:256].lstrip().lower()
    if not start:
        raise EngineUnavailable("empty answer")
    if start.startswith(b"<"):
        raise EngineUnavailable("an HTML or XML page instead of a result")
    raise EngineUnavailable("answer is not JSON, or was cut short")


def _read_result(answer: dict[str, Any], request: SearchRequest) -> SearchResult:
    ids = answer.get("idlist", [])
    count = _non_negative(answer.get("count"))
    if count is None or not isinstance(ids, list) or not set(map(type, ids)) <= {str} or not all(ids):
        raise EngineUnavailable("malformed result: count or idlist is missing or of the wrong type")
    expected = min(request.retmax, count, PUBMED_MAX_IDS)
    if len(ids) != expected:
        raise EngineUnavailable(f"incomplete result: {len(ids)} ids where {expected} were due")
    translation = answer.get("querytranslation")
    return SearchResult(
        ids=tuple(ids),
        count=count,
        translation=translation if isinstance(translation, str) else "",
        warnings=_warnings(answer),
    )


def _non_negative(value: Any) -> int | None:
    """NCBI writes numbers as strings, emulators as numbers."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    try:
        number = int(value)
    except ValueError:
        return None
    return number if number >= 0 else None


def _warnings(answer: dict[str, Any]) -> tuple[str, ...]:
    """Remarks as "list: text", e.g. "phrasesnotfound: foo"."""
    remarks: list[str] = []
    for section in ("errorlist", "warninglist"):
        lists = answer.get(section)
        if not isinstance(lists, dict):
            continue
        for name, texts in lists.items():
            if isinstance(texts, list):
                remarks += [f"{name}: {text}" for text in texts if isinstance(text, str)]
    return tuple(remarks)
