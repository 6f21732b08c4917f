"""What a rewarder needs from a search engine, and the two ways a search can fail.

The two failures are types of their own because they mean opposite things to training: `BadQuery` is the
model's fault and earns a low reward, `EngineUnavailable` says nothing about the query and earns none.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod

import msgspec

from rewarders.lifecycle import Started

_DATE = re.compile(r"\d{4}(/\d{1,2}(/\d{1,2})?)?", re.ASCII)


class SearchRequest(msgspec.Struct, frozen=True):
    """One search; equal requests may share one answer, so it is also the key of the cache.

    term: the query; runs of whitespace are collapsed so that equal queries are equal. retmax: ids wanted,
    at least 1. sort: the engine's name of an order, always explicit because it decides which ids are cut.
    min_date, max_date: publication dates as YYYY, YYYY/MM or YYYY/MM/DD, both inclusive, None for open.
    with_texts: the texts and titles of the documents are wanted too; an engine that has none ignores it.
    Raises ValueError for an empty term, a bad date or retmax < 1.
    """

    term: str
    retmax: int
    sort: str = "pub_date"
    min_date: str | None = None
    max_date: str | None = None
    with_texts: bool = False

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "term", " ".join(self.term.split()))
        if not self.term:
            raise ValueError("a search needs a query that is not empty")
        if self.retmax < 1:
            raise ValueError(f"retmax must be at least 1, got {self.retmax}")
        for date in (self.min_date, self.max_date):
            if date is not None and not _DATE.fullmatch(date):
                raise ValueError(f"a date must be YYYY, YYYY/MM or YYYY/MM/DD, got {date!r}")


class SearchResult(msgspec.Struct, frozen=True):
    """What the engine found.

    ids: at most retmax document ids in the engine's order. count: all matches. translation: how the
    engine understood the query. warnings: its remarks, e.g. about terms it does not know. texts, titles: of
    the documents, in the order of the ids, where the request wants them and the engine has them.
    """

    ids: tuple[str, ...]
    count: int
    translation: str = ""
    warnings: tuple[str, ...] = ()
    texts: tuple[str, ...] | None = None
    titles: tuple[str, ...] | None = None


class BadQuery(Exception):  # noqa: N818 (the name of the verdict)
    """The query itself is at fault, and would be on every day."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class EngineUnavailable(Exception):  # noqa: N818 (the name of the verdict)
    """The engine could not be asked, or gave no usable answer; the query may be perfectly good.

    retry_after_s: seconds the engine asked to be left alone, None if it did not say.
    """

    def __init__(self, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after_s = retry_after_s


class EngineThrottled(EngineUnavailable):
    """The engine works, and refuses this request because there were too many: come back after `retry_after_s`."""


class EngineMisconfigured(EngineUnavailable):
    """The engine refuses every request because of how it is called (key, address): retrying cannot help."""


class SearchEngine(Started, ABC):
    """An engine that answers searches concurrently; use it as an async context manager."""

    async def start(self) -> None:
        """Open what searching needs. Called once, before the first search."""

    async def close(self) -> None:
        """Release everything; running searches fail with `EngineUnavailable`."""

    @abstractmethod
    async def check(self) -> None:
        """Make one cheap request. Raises EngineUnavailable with one clear line if the engine cannot be
        used.
        """

    async def data_version(self) -> str:
        """What identifies the engine's data at this time; "" if it does not say. Part of every cache key.

        Raises:
            EngineUnavailable: it should say, and could not be asked.
        """
        return ""

    @abstractmethod
    async def search(self, request: SearchRequest) -> SearchResult:
        """Ask once, without retries. Raises `BadQuery` or `EngineUnavailable`, nothing else."""

    def counters(self) -> dict[str, float]:
        """Figures since the start, for the status of the rewarder."""
        return {}
