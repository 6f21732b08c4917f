"""From a generated text to a `Score`: parse, search through cache and retries, measure.

No quota is spent on a text that does not parse, on a duplicate, or on a query already answered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from common.scores import InvalidOutput, Score, Scored, Unavailable
from common.tasks import Hits, ParsedAnswer, ParseFailure, Row, Task
from rewarders.cache import SearchCache
from rewarders.engines.base import BadQuery, EngineUnavailable, SearchEngine, SearchRequest, SearchResult
from rewarders.retry import Retrier

REFUSED_QUERY = "refused_query"


class Scorer:
    """Scores texts of one task against one started engine; safe for any number of concurrent calls on one
    loop.
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

    async def score_text(self, text: str, row: Row) -> Score:
        """Score one generated text for the request `row`.

        An answer that does not parse and a query the engine refuses are `InvalidOutput` with the task's
        penalties; an engine that cannot be asked, after the retries, is `Unavailable`.
        """
        answer = self.task.parse(text)
        if isinstance(answer, ParseFailure):
            verdict = self.task.malformed_score(answer)
            return InvalidOutput(reward=verdict.reward, reason=answer.reason, metrics=verdict.metrics)
        try:
            result = await self.search(answer.query, row)
        except BadQuery as error:
            return self._refused(answer, error)
        except EngineUnavailable as error:
            return Unavailable(reason=error.reason, retry_after_s=error.retry_after_s)
        score = self.task.score(row, answer, Hits(result.ids, result.count))
        return Scored(
            reward=score.reward,
            metrics={**score.metrics, **answer.lengths()},
            query=answer.query,
            results=result.count,
        )

    async def score_group(self, texts: Sequence[str], row: Row) -> list[Score]:
        """Score the samples of one request concurrently, in order; equal texts are scored once."""
        async with asyncio.TaskGroup() as group:
            tasks = {text: group.create_task(self.score_text(text, row)) for text in dict.fromkeys(texts)}
        return [tasks[text].result() for text in texts]

    async def search(self, query: str, row: Row) -> SearchResult:
        """Search as a score of `row` does. Raises BadQuery, or EngineUnavailable after the retries."""
        max_date = row.max_date if self.task.dated else None
        request = SearchRequest(term=query, retmax=self.task.top_k, sort=self.sort, max_date=max_date)
        return await self.cache.search(request, self._fetch)

    async def _fetch(self, request: SearchRequest) -> SearchResult:
        return await self.retrier.run(lambda: self.engine.search(request))

    def _refused(self, answer: ParsedAnswer, error: BadQuery) -> InvalidOutput:
        verdict = self.task.refused_score()
        return InvalidOutput(
            reward=verdict.reward,
            reason=REFUSED_QUERY,
            metrics={**verdict.metrics, **answer.lengths()},
            query=answer.query,
            detail=error.reason,
        )
