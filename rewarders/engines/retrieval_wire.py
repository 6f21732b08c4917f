"""What the client of a retrieval server and the server say to each other: MessagePack in the bodies of POST /search."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

SEARCH_PATH: Final = "/search"
VERSION_PATH: Final = "/version"
CONTENT_TYPE: Final = "application/msgpack"
MAX_SEARCHES: Final = 256
# The order of a search (`SearchRequest.sort`) in which BM25 ranks by what RM3 makes of the query; any other is by its
# own relevance.
RM3_SORT: Final = "rm3"
MAX_TERM_CHARACTERS: Final = 32_768
MAX_K: Final = 100_000
# Of one request; every term in full length would fit.
MAX_BODY_BYTES: Final = 4 * MAX_SEARCHES * MAX_TERM_CHARACTERS + 65_536


class Search(msgspec.Struct, frozen=True, array_like=True):
    """One search. k: most ids wanted. texts: the documents themselves are wanted too. rm3: in the order RM3_SORT."""

    term: Annotated[str, msgspec.Meta(max_length=MAX_TERM_CHARACTERS)]
    k: Annotated[int, msgspec.Meta(ge=1, le=MAX_K)]
    texts: bool = False
    rm3: bool = False


class Searches(msgspec.Struct, frozen=True):
    """The body of a request."""

    searches: Annotated[list[Search], msgspec.Meta(min_length=1, max_length=MAX_SEARCHES)]


class Found(msgspec.Struct, frozen=True, tag="found", array_like=True):
    """ids: best first. count: all matches. texts, titles: of the same documents, where they were wanted."""

    ids: tuple[str, ...]
    count: int
    texts: tuple[str, ...] | None = None
    titles: tuple[str, ...] | None = None


class Refused(msgspec.Struct, frozen=True, tag="refused", array_like=True):
    """The query itself is at fault."""

    reason: str


class Unanswered(msgspec.Struct, frozen=True, tag="unanswered", array_like=True):
    """The server has no answer, which says nothing about the query."""

    reason: str


Answer = Found | Refused | Unanswered


class Answers(msgspec.Struct, frozen=True):
    """The body of a reply: an `Answer` per search, in its order, each encoded by itself so that who waits for it
    decodes it. version: of the data that was searched.
    """

    version: str
    answers: list[msgspec.Raw]


class Version(msgspec.Struct, frozen=True):
    """The answer of /version, in JSON."""

    kind: str
    version: str
    documents: int
