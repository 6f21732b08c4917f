"""From a generated text to a `Score`: parse, try the answer, measure.

An answerer is asked about texts that parse only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from common.scores import InvalidOutput, Score, Scored, Unavailable
from common.tasks import Execution, Hits, Outcome, ParsedAnswer, ParseFailure, Row, Task, TaskScore
from rewarders.answerers.base import Answerer
from rewarders.engines.base import BadQuery, EngineUnavailable

REFUSED_QUERY = "refused_query"
# Comparing tables of more cells than this takes milliseconds, a hostile one seconds: other samples must not wait.
INLINE_CELLS = 20_000


class Scorer:
    """Scores texts of one task by what a started answerer makes of them; safe for any number of concurrent calls on
    one loop.
    """

    def __init__(self, task: Task, answerer: Answerer) -> None:
        self.task = task
        self.answerer = answerer

    async def score_text(self, text: str, row: Row) -> Score:
        """Score one generated text for the request `row`.

        An answer that does not parse and a query the engine refuses are `InvalidOutput` with the task's
        penalties; an engine that cannot be asked, after the retries, is `Unavailable`.

        Raises:
            ValueError: the task cannot score what came back, or a user's own metric failed.
        """
        answer = self.task.parse(text)
        if isinstance(answer, ParseFailure):
            verdict = self.task.malformed_score(answer)
            return InvalidOutput(reward=verdict.reward, reason=answer.reason, metrics=verdict.metrics)
        try:
            outcome = await self.answerer.outcome(answer, row)
        except BadQuery as error:
            return self._refused(answer, error)
        except EngineUnavailable as error:
            return Unavailable(reason=error.reason, retry_after_s=error.retry_after_s)
        score = await self._measured(row, answer, outcome)
        return Scored(
            reward=score.reward,
            metrics={**score.metrics, **answer.lengths()},
            query=answer.query,
            results=results_of(outcome),
        )

    async def score_group(self, texts: Sequence[str], row: Row) -> list[Score]:
        """Score the samples of one request concurrently, in order; equal texts are scored once."""
        async with asyncio.TaskGroup() as group:
            tasks = {text: group.create_task(self.score_text(text, row)) for text in dict.fromkeys(texts)}
        return [tasks[text].result() for text in texts]

    async def _measured(self, row: Row, answer: ParsedAnswer, outcome: Outcome) -> TaskScore:
        """The task's score; a long comparison goes to a thread, which a pure task does not mind."""
        if cells_of(outcome) > INLINE_CELLS:
            return await asyncio.to_thread(self.task.score, row, answer, outcome)
        return self.task.score(row, answer, outcome)

    def _refused(self, answer: ParsedAnswer, error: BadQuery) -> InvalidOutput:
        verdict = self.task.refused_score()
        return InvalidOutput(
            reward=verdict.reward,
            reason=REFUSED_QUERY,
            metrics={**verdict.metrics, **answer.lengths()},
            query=answer.query,
            detail=error.reason,
        )


def results_of(outcome: Outcome) -> int:
    """How much came back: matches of a search, rows of a table."""
    if isinstance(outcome, Hits):
        return outcome.count
    return len(outcome.table.rows) if outcome.table is not None else 0


def cells_of(outcome: Outcome) -> int:
    """Cells of the larger of the tables that have to be compared; 0 for a ranking."""
    if not isinstance(outcome, Execution):
        return 0
    tables = (outcome.table, outcome.gold)
    return max(len(table.rows) * len(table.columns) if table is not None else 0 for table in tables)
