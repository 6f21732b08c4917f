"""Reading an answer of the ClinicalTrials.gov API v2: a page of trial ids, or whose fault it is that there is none.

Pure: bytes in, verdict out. Results are JSON; refusals are status 400 and one line of plain text whose beginning
says which part of the request was refused. That beginning is written by the service and comes before anything it
quotes, so a model cannot write a query that is refused in the words of another verdict.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, TypeVar

import msgspec

from rewarders.engines.base import BadQuery, EngineMisconfigured, EngineUnavailable
from rewarders.engines.verdicts import Undecided, retry_after_seconds

MAX_PAGE_SIZE: Final = 1000
# No limit is published and no Retry-After has been seen; these stand in for a missing one.
RATE_LIMIT_WAIT_S: Final = 10.0
FORBIDDEN_WAIT_S: Final = 60.0
_MAX_DETAIL_CHARS: Final = 200

_QUERY_REFUSED: Final = re.compile(
    r"Error parsing query in Other terms\b|Too complicated query|Parameter .query\.term."
)
_TOKEN_REFUSED: Final = re.compile(r"[\w ]{0,40}.pageToken.")
_REQUEST_REFUSED: Final = re.compile(
    r".[\w.]+. is unknown parameter"
    r"|Error parsing query in advanced filter\b"
    r"|(?:Item \d+ in p|Invalid value in p|P)arameter\b"
    r"|Invalid prefix in parameter name"
    r"|(?:Unknown|Unsupported) sort field"
)


class Page(msgspec.Struct, frozen=True):
    """One page of studies.

    ids: trial ids in the engine's order, as many as were sent. total: all matches, on the first page only.
    next_token: what the next page is asked with, None on the last one.
    """

    ids: tuple[str, ...]
    total: int | None = None
    next_token: str | None = None


class _Identification(msgspec.Struct):
    nct_id: str = msgspec.field(name="nctId")


class _Protocol(msgspec.Struct):
    identification: _Identification = msgspec.field(name="identificationModule")


class _Study(msgspec.Struct):
    protocol: _Protocol = msgspec.field(name="protocolSection")


class _Studies(msgspec.Struct):
    studies: list[_Study]
    total: int | None = msgspec.field(name="totalCount", default=None)
    next_token: str | None = msgspec.field(name="nextPageToken", default=None)


class _Version(msgspec.Struct):
    data_timestamp: str = msgspec.field(name="dataTimestamp")


T = TypeVar("T")


def read_page(status: int, headers: Mapping[str, str], body: bytes) -> Page:
    """Turn one HTTP answer of /studies into a page.

    headers: looked up case-insensitively if the mapping does so, as aiohttp's does.
    Raises BadQuery, EngineUnavailable, EngineMisconfigured or Undecided.
    """
    raise_for_status(status, headers, body)
    answer = _decode(body, _Studies)
    ids = tuple(study.protocol.identification.nct_id for study in answer.studies)
    if not all(ids) or (answer.total is not None and answer.total < 0):
        raise EngineUnavailable("malformed result: an empty id or a negative count")
    return Page(ids, answer.total, answer.next_token or None)


def read_version(status: int, headers: Mapping[str, str], body: bytes) -> str:
    """The time of the data, as the service writes it, from one HTTP answer of /version. Raises as `read_page`."""
    raise_for_status(status, headers, body)
    timestamp = _decode(body, _Version).data_timestamp.strip()
    if not timestamp:
        raise EngineUnavailable("malformed version: the time of the data is empty")
    return timestamp


def raise_for_status(status: int, headers: Mapping[str, str], body: bytes) -> None:
    """Return on status 200; classify every other one. Raises as `read_page`."""
    if status == 200:
        return
    wait = retry_after_seconds(headers.get("Retry-After"))
    if status == 429:
        raise EngineUnavailable("rate limit exceeded", RATE_LIMIT_WAIT_S if wait is None else wait)
    if status == 403:
        reason = "access refused (HTTP 403): the service filters clients by address and User-Agent"
        raise EngineUnavailable(reason, FORBIDDEN_WAIT_S if wait is None else wait)
    if status in (413, 414, 431):
        raise BadQuery(f"query too long for the engine (HTTP {status})")
    if status in (301, 302, 303, 307, 308):
        raise EngineMisconfigured(f"the engine's address redirects (HTTP {status}): set the address it moved to")
    if status in (400, 422):
        _raise_for_refusal(body)
    if status == 404 and _is_markup(body):
        raise EngineUnavailable("a page not found instead of an answer (HTTP 404): check the engine's address", wait)
    if 400 <= status < 500 and status not in (408, 425):
        raise EngineMisconfigured(f"the request is refused (HTTP {status}): check the engine's address and settings")
    raise EngineUnavailable(f"HTTP {status}", wait)


def _raise_for_refusal(body: bytes) -> None:
    """Classify the text of a status 400. Always raises."""
    if _is_markup(body):
        # A gateway or the web server itself: it may dislike the address, or be broken.
        raise Undecided("request refused (HTTP 400)")
    text = body.decode("utf-8", "replace").strip()
    detail = one_line(text)
    if _QUERY_REFUSED.match(text):
        raise BadQuery(detail)
    if _TOKEN_REFUSED.match(text):
        raise EngineUnavailable("the service no longer takes the page token it gave")
    if _REQUEST_REFUSED.match(text):
        raise EngineMisconfigured(f"the request is refused: {detail}")
    raise Undecided(detail or "request refused (HTTP 400)")


def one_line(text: str) -> str:
    """A refusal as a short line of printable characters, without the list of tokens the grammar would take."""
    text = text.split(" expecting {")[0]
    printable = "".join(character if character.isprintable() else " " for character in text[: 4 * _MAX_DETAIL_CHARS])
    return " ".join(printable.split())[:_MAX_DETAIL_CHARS]


def _decode(body: bytes, kind: type[T]) -> T:
    if not body.strip():
        raise EngineUnavailable("empty answer")
    if _is_markup(body):
        raise EngineUnavailable("an HTML or XML page instead of a result")
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError:
        raise EngineUnavailable("malformed result: a field is missing or of the wrong type") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise EngineUnavailable("answer is not JSON, or was cut short") from None


def _is_markup(body: bytes) -> bool:
    return body[:256].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<")
