"""What the retrieval server needs from an index, whatever is inside."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import msgspec


class Query(msgspec.Struct, frozen=True):
    """One search. k: most ids wanted, at least 1. rm3: by RM3 (`rm3.expanded_query`), the term being a bag of words."""

    term: str
    k: int
    rm3: bool = False


class Ranking(msgspec.Struct, frozen=True):
    """ids: best first, ties by id, none twice. scores: of the same documents, falling. count: all matches, where the
    index knows them (a dense one ranks everything: its size)."""

    ids: tuple[str, ...]
    scores: tuple[float, ...]
    count: int


class Refusal(msgspec.Struct, frozen=True):
    """The query itself is at fault. reason: one line."""

    reason: str


class Backend(ABC):
    """An index that answers many queries at once. Calls do not overlap: the server batches what arrives meanwhile."""

    kind: ClassVar[str]
    batch: int = 64
    """Most queries worth giving at once."""

    @abstractmethod
    async def start(self) -> None:
        """Build or open the index. Raises DataError (the corpus) or SearchServerError (anything else), in one line
        that says what to do.
        """

    @abstractmethod
    async def close(self) -> None:
        """Release everything."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Documents."""

    @property
    @abstractmethod
    def version(self) -> str:
        """Identifies corpus and settings: equal versions give equal answers."""

    @abstractmethod
    async def search(self, queries: Sequence[Query]) -> list[Ranking | Refusal]:
        """One answer per query, in order. Raises EngineUnavailable if there is none for reasons of our own."""
