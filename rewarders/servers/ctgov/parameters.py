"""Reads the parameters of /studies. Unlike esearch, the service refuses what it does not understand."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from rewarders.servers.ctgov.areas import AREAS, BASIC_SEARCH, FIELDS, Area, Kind, area_of, field_of
from rewarders.servers.ctgov.essie import parse
from rewarders.servers.ctgov.index import RELEVANCE, Search, SortKey
from rewarders.servers.ctgov.lexemes import EssieError
from rewarders.servers.ctgov.syntax import Coverage, Node, Or, Term
from rewarders.servers.text import search_words

DEFAULT_PAGE_SIZE = 10
MAX_PAGE_SIZE = 1000
MAX_SORT_KEYS = 2

# Query parameter: its search area, and what errors call it.
QUERIES: Mapping[str, tuple[str, str]] = {
    "query.term": ("BasicSearch", "Other terms"),
    "query.cond": ("ConditionSearch", "Conditions or disease"),
    "query.intr": ("InterventionSearch", "Intervention / treatment"),
    "query.titles": ("TitleSearch", "Title / acronym"),
    "query.outc": ("OutcomeSearch", "Outcome measure"),
    "query.spons": ("SponsorSearch", "Sponsor / collaborator"),
    "query.lead": ("LeadSponsorName", "Sponsor (lead)"),
    "query.id": ("IdSearch", "Study IDs"),
    "query.locn": ("LocationSearch", "Location terms"),
    "query.patient": ("PatientSearch", "Patient"),
}
# They narrow the result alike; `filter.` and `postFilter.` differ in what they do to scores only.
_FILTERS = {f"{prefix}.{name}" for prefix in ("filter", "postFilter") for name in ("ids", "advanced", "overallStatus")}
_UNSUPPORTED = {"filter.geo", "postFilter.geo", "filter.synonyms", "postFilter.synonyms", "aggFilters", "geoDecay"}
_OTHERS = {"format", "markupFormat", "fields", "sort", "countTotal", "pageSize", "pageToken"}
KNOWN = frozenset({*QUERIES, *_FILTERS, *_UNSUPPORTED, *_OTHERS})

_NCT_IDS = re.compile(r"[\s,]*NCT\d{8}(?:[\s,]+NCT\d{8})*[\s,]*", re.ASCII | re.IGNORECASE)
_NCT_ID = re.compile(r"NCT\d{8}", re.ASCII | re.IGNORECASE)
_SORT_ITEM = re.compile(r"([A-Za-z][A-Za-z0-9\-. ]*|@relevance)(?::(asc|desc))?")
_SECTIONS = ("protocolSection", "derivedSection", "resultsSection", "documentSection")


class StudiesError(ValueError):
    """A request that the service answers with status 400 and this text."""


@dataclass(frozen=True, slots=True)
class StudiesRequest:
    """The parameters of one call as understood. paths: what of a record to send, None for all of it."""

    search: Search
    paths: tuple[str, ...] | None
    page_size: int
    start: int
    count_total: bool


def studies_request(parameters: Mapping[str, str]) -> StudiesRequest:
    """Read the parameters of /studies.

    Raises:
        StudiesError: one is unknown, not supported, or malformed.
    """
    for name in parameters:
        if name not in KNOWN:
            raise StudiesError(f"`{name}` is unknown parameter")
        if name in _UNSUPPORTED:
            raise StudiesError(f"`{name}` is not supported by this server")
    if parameters.get("format", "json") != "json":
        raise StudiesError("Invalid value in parameter `format`: only `json` is supported by this server")
    start = _start(parameters.get("pageToken"))
    return StudiesRequest(
        search=_search(parameters),
        paths=_paths(parameters["fields"]) if "fields" in parameters else None,
        page_size=_page_size(parameters.get("pageSize", "")),
        start=start,
        # Ignored on later pages, as recorded answers show.
        count_total=_flag("countTotal", parameters.get("countTotal", "false")) and start == 0,
    )


# What to search.


def _search(parameters: Mapping[str, str]) -> Search:
    queries: list[Node] = []
    ignore_filters = False
    for name, (area, label) in QUERIES.items():
        text = parameters.get(name, "")
        if _NCT_IDS.fullmatch(text):
            queries.append(_any_of_ids(_NCT_ID.findall(text)))
            ignore_filters = True
        elif node := _parse(text, area_of(area) or BASIC_SEARCH, label):
            queries.append(node)
    filters, ids = _filters(parameters)
    if ignore_filters:
        filters, ids = (), None
    return Search(tuple(queries), filters, ids, _sort(parameters.get("sort", "")))


def _any_of_ids(ids: list[str]) -> Term:
    phrases = tuple(tuple(search_words(trial)) for trial in ids)
    return Term(phrases, AREAS["NCTIdSearch"], Coverage.FULL_MATCH, any_phrase=True)


def _parse(text: str, area: Area, label: str) -> Node | None:
    try:
        return parse(text, area)
    except EssieError as error:
        raise StudiesError(f"Error parsing query in {label}: {error}") from None


def _filters(parameters: Mapping[str, str]) -> tuple[tuple[Node, ...], tuple[str, ...] | None]:
    nodes: list[Node] = []
    ids: set[str] | None = None
    for prefix in ("filter", "postFilter"):
        if node := _parse(parameters.get(f"{prefix}.advanced", ""), BASIC_SEARCH, "advanced filter"):
            nodes.append(node)
        if statuses := _items(parameters.get(f"{prefix}.overallStatus", "")):
            nodes.append(_any_status(statuses))
        if wanted := _ids(f"{prefix}.ids", parameters.get(f"{prefix}.ids", "")):
            ids = wanted if ids is None else ids & wanted
    return tuple(nodes), None if ids is None else tuple(sorted(ids))


def _any_status(statuses: list[str]) -> Node:
    field = FIELDS["OverallStatus"]
    for status in statuses:
        if status not in field.values:
            raise StudiesError(f"Invalid value in parameter `overallStatus`: `{status}`")
    area = Area(field.name, (field,))
    return Or(tuple(Term((tuple(search_words(status)),), area, Coverage.FULL_MATCH) for status in statuses))


def _ids(name: str, text: str) -> set[str]:
    items = _items(text)
    for number, item in enumerate(items, start=1):
        if not _NCT_ID.fullmatch(item):
            raise StudiesError(f"Item {number} in parameter `{name}` has incorrect format")
    return {item.upper() for item in items}


def _sort(text: str) -> tuple[SortKey, ...]:
    """Dates and relevance go down by default, numbers go up."""
    items = _items(text)
    if len(items) > MAX_SORT_KEYS:
        raise StudiesError(f"Parameter `sort` must contain no more than {MAX_SORT_KEYS} items")
    keys = []
    for number, item in enumerate(items, start=1):
        match = _SORT_ITEM.fullmatch(item)
        if match is None:
            raise StudiesError(f"Item {number} in parameter `sort` has incorrect format")
        keys.append(_sort_key(match[1], match[2]))
    return tuple(keys)


def _sort_key(name: str, direction: str | None) -> SortKey:
    if name == RELEVANCE:
        return SortKey(RELEVANCE, direction != "asc")
    field = field_of(name)
    if field is None:
        raise StudiesError("Unknown sort field")
    if field.kind not in (Kind.DATE, Kind.NUMBER):
        raise StudiesError(f"Unsupported sort field type: {field.kind.value}")
    return SortKey(field.name, direction == "desc" if direction else field.kind is Kind.DATE)


# What to send.


def _paths(text: str) -> tuple[str, ...]:
    items = _items(text)
    if not items:
        raise StudiesError("Parameter `fields` must not be empty")
    return tuple(path for item in items for path in _paths_of(item))


def _paths_of(name: str) -> list[str]:
    """A piece, an area, or a branch of the record by its path or its name in capitals (`ProtocolSection`)."""
    if area := area_of(name):
        return [field.path for field in area.fields]
    path = name[:1].lower() + name[1:]
    if path.split(".")[0] in _SECTIONS:
        return [path]
    raise StudiesError(f"Parameter 'fields' contains invalid field name: '{name}'")


def _page_size(text: str) -> int:
    if text and not (text.isdecimal() and text.isascii() and len(text) < 10):
        raise StudiesError("Parameter `pageSize` has incorrect format")
    return min(int(text or 0), MAX_PAGE_SIZE) or DEFAULT_PAGE_SIZE


def _flag(name: str, text: str) -> bool:
    if text not in ("true", "false"):
        raise StudiesError(f"Parameter `{name}` has incorrect format")
    return text == "true"


def _items(text: str) -> list[str]:
    """The items of a list separated by commas or pipes."""
    return [item.strip() for item in re.split(r"[,|]", text) if item.strip()]


# Page tokens: opaque to clients. Like those of the service they hold a place only, not the query.


def page_token(start: int) -> str:
    """The token of the page that begins at place `start` of the results."""
    place = start.to_bytes(6, "big")
    return base64.urlsafe_b64encode(place + _seal(place)).decode()


def _start(token: str | None) -> int:
    if not token:
        return 0
    try:
        sealed = base64.b64decode(token.encode(), b"-_", validate=True)
    except (binascii.Error, ValueError):
        sealed = b""
    place, seal = sealed[:6], sealed[6:]
    if len(place) != 6 or seal != _seal(place):
        raise StudiesError("Parameter `pageToken` has incorrect format")
    return int.from_bytes(place, "big")


def _seal(place: bytes) -> bytes:
    return hashlib.sha256(b"studies page" + place).digest()[:18]
