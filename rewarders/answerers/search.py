"""Answers that are queries: searched through cache and retries.

No quota is spent on a query already answered, or asked by another sample at this moment.
"""

from __future__ import annotations

import copy

import msgspec

from common.tasks import Hits, ParsedAnswer, Row, Task
from rewarders.answerers.base import Answerer
from rewarders.cache import SearchCache
from rewarders.engines.base import SearchEngine, SearchRequest, SearchResult
from rewarders.errors import ScoringError
from rewarders.retry import Retrier


class SearchAnswerer(Answerer):
    """Searches one engine for one task; starts and closes it.

    sort: the engine's name of an order.
    """

    def __init__(
        self,
        task: Task,
        engine: SearchEngine,
        *,
        sort: str = "pub_date",
        cache: SearchCache | None = None,
        retrier: Retrier | None = None,
    ) -> None:
        self.task = task
        self.engine = engine
        self.sort = sort
        self.cache = cache if cache is not None else SearchCache()
        self.retrier = retrier or Retrier()

        if self.cache.version is None and type(engine).data_version is not SearchEngine.data_version:
            self.cache.version = self._data_version

    async def start(self) -> None:
        await self.engine.start()
        await self.cache.start()

    async def close(self) -> None:
        await self.cache.close()
        await self.engine.close()

    def sorted_by(self, sort: str) -> SearchAnswerer:
        """The same engine, cache and retries, in another order; it works from this one's start to its close."""
        other = copy.copy(self)
        other.sort = sort
        return other

    async def outcome(self, answer: ParsedAnswer, row: Row) -> Hits:
        result = await self.search(answer.query, row)
        return Hits(result.ids, result.count, result.texts, result.titles)

    async def search(
        self, query: str, row: Row, retmax: int | None = None, with_texts: bool | None = None
    ) -> SearchResult:
        """Search as an answer to `row` is. retmax, with_texts: what is wanted, None: what the task needs. Raises
        BadQuery, or EngineUnavailable after the retries; ScoringError for a row that cannot be searched for.
        """
        try:
            request = SearchRequest(
                term=query,
                retmax=retmax or self.task.top_k,
                sort=self.sort,
                max_date=row.max_date if self.task.dated else None,
                with_texts=self.task.needs_texts if with_texts is None else with_texts,
            )
        except ValueError as error:
            raise ScoringError(f"row {row.id!r} cannot be searched for: {error}") from None
        return await self.cache.search(request, self._fetch)

    def counters(self) -> dict[str, float]:
        stats = msgspec.structs.asdict(self.cache.stats)
        return {
            **{f"cache_{name}": float(value) for name, value in stats.items()},
            "retries": float(self.retrier.retries),
            **self.engine.counters(),
        }

    async def _data_version(self) -> str:
        return await self.retrier.run(self.engine.data_version)

    async def _fetch(self, request: SearchRequest) -> SearchResult:
        return await self.retrier.run(lambda: self.engine.search(request))
