"""Reads the parameters of an esearch call as NCBI does: what it does not understand, it ignores and
mentions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rewarders.servers.dates import date_range
from rewarders.servers.pubmed.index import Sort

DEFAULT_RETMAX = 20
# PubMed hands out the first 9,999 results of a query only.
MAX_RESULTS = 9_999

_SORTS: Mapping[str, Sort] = {
    "": "pub_date",
    "pub_date": "pub_date",
    "pub date": "pub_date",
    "most recent": "pub_date",
    "date": "pub_date",
    "relevance": "relevance",
}
_RETSTART_ERROR = (
    "Search Backend failed: Exception:\n'retstart' cannot be larger than 9998. For PubMed, ESearch can only "
    "retrieve the first 9,999 records matching the query. To obtain more than 9,999 PubMed records, consider "
    "using EDirect that contains additional logic to batch PubMed search results automatically so that an "
    "arbitrary number can be retrieved. For details see https://www.ncbi.nlm.nih.gov/books/NBK25499/"
)


class EsearchError(ValueError):
    """A request that esearch answers with status 200 and this text as ERROR."""


@dataclass(frozen=True, slots=True)
class SearchRequest:
    """The parameters of one esearch call as understood; `messages` say which were not."""

    term: str
    retmax: int
    retstart: int
    sort: Sort
    mindate: str | None
    maxdate: str | None
    messages: tuple[str, ...]


def search_of(parameters: Mapping[str, str]) -> SearchRequest:
    """Read esearch parameters.

    Raises:
        EsearchError: the database is not PubMed, there is no term, or `retstart` is past the last result
            handed out.
    """
    database = parameters.get("db", "pubmed").strip().lower()
    if database != "pubmed":
        raise EsearchError(f"Invalid db name specified: {database}")
    term = parameters.get("term", "")
    if not term.strip():
        raise EsearchError("Empty term and query_key - nothing todo")
    retstart = _whole_number(parameters.get("retstart"), 0)
    if retstart >= MAX_RESULTS:
        raise EsearchError(_RETSTART_ERROR)
    retmax = min(_whole_number(parameters.get("retmax"), DEFAULT_RETMAX), MAX_RESULTS - retstart)
    messages: list[str] = []
    mindate, maxdate = _dates(parameters, messages)
    sort_name = parameters.get("sort", "").strip().replace("+", " ").lower()
    if sort_name not in _SORTS:
        messages.append(f"Unknown sort schema '{sort_name}' ignored")
    sort = _SORTS.get(sort_name, "pub_date")
    return SearchRequest(term, retmax, retstart, sort, mindate, maxdate, tuple(messages))


def _dates(parameters: Mapping[str, str], messages: list[str]) -> tuple[str | None, str | None]:
    """The pair mindate and maxdate. Whatever `datetype` says, they bound the publication date."""
    mindate, maxdate = (parameters.get(key, "").strip() for key in ("mindate", "maxdate"))
    if parameters.get("reldate", "").strip():
        messages.append("reldate is not supported here and was ignored: use mindate and maxdate")
    if not mindate and not maxdate:
        return None, None
    if not mindate or not maxdate:
        messages.append("mindate and maxdate must be used together: both were ignored")
        return None, None
    for text in (mindate, maxdate):
        if ":" in text or date_range(text) is None:
            messages.append(f"'{text}' is no date: mindate and maxdate were ignored")
            return None, None
    return mindate, maxdate


def _whole_number(text: str | None, default: int) -> int:
    text = (text or "").strip()
    return int(text) if text.isdecimal() and len(text) < 12 else default
