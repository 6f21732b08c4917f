"""From a generated text to a `Score`: parse, try the answer, measure.

An answerer is asked about texts that parse only. What the task's code cannot score is no outage, for it would fail
for ever: it is fatal.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from common.scores import InvalidOutput, Score, Scored, Unavailable
from common.tasks import Execution, Hits, Outcome, ParsedAnswer, ParseFailure, Row, Task, TaskScore
from rewarders.answerers.base import Answerer
from rewarders.engines.base import BadQuery, EngineUnavailable
from rewarders.errors import FatalScoringError, ScoringError

logger = logging.getLogger(__name__)

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
            FatalScoringError: the task cannot score what came back, a user's own metric failed, or the answerer
                says that waiting is of no use.
        """
        with self._judging(row):
            answer = self.task.parse(text)
            if isinstance(answer, ParseFailure):
                verdict = self.task.malformed_score(answer)
                return InvalidOutput(reward=verdict.reward, reason=answer.reason, metrics=verdict.metrics)
        return await self.score_answer(answer, row)

    async def score_answer(self, answer: ParsedAnswer, row: Row) -> Score:
        """Score an answer that is parsed already, or was never a text of a model. Raises as `score_text`."""
        try:
            outcome = await self.answerer.outcome(answer, row)
        except BadQuery as error:
            with self._judging(row):
                return self._refused(answer, error)
        except EngineUnavailable as error:
            return Unavailable(reason=error.reason, retry_after_s=error.retry_after_s)
        with self._judging(row):
            score = await self._score(row, answer, outcome)
            return Scored(
                reward=score.reward,
                metrics={**score.metrics, **answer.lengths()},
                query=answer.query,
                results=results_of(outcome),
            )

    async def score_group(self, texts: Sequence[str], row: Row) -> list[Score]:
        """Score the samples of one request concurrently, in order; equal texts are scored once.

        Raises:
            FatalScoringError: as `score_text`, the first of them.
        """
        try:
            async with asyncio.TaskGroup() as group:
                tasks = {text: group.create_task(self.score_text(text, row)) for text in dict.fromkeys(texts)}
        except ExceptionGroup as failures:
            if fatal := failures.subgroup(FatalScoringError):
                raise fatal.exceptions[0] from None
            raise
        return [tasks[text].result() for text in texts]

    async def _score(self, row: Row, answer: ParsedAnswer, outcome: Outcome) -> TaskScore:
        if cells_of(outcome) > INLINE_CELLS:  # a pure task does not mind in which thread it works
            return await asyncio.to_thread(self.task.score, row, answer, outcome)
        return self.task.score(row, answer, outcome)

    @contextlib.contextmanager
    def _judging(self, row: Row) -> Iterator[None]:
        """Around the task's own code: whatever it raises would come again on every day."""
        try:
            yield
        except Exception as error:  # a user's own code may raise anything
            logger.exception("scoring row %r failed", row.id)
            raise ScoringError(f"the task {self.task.name} cannot score row {row.id!r}: {described(error)}") from error

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


def described(error: Exception) -> str:
    """An error of code that may be the user's, in one line: what it says, and where it was raised."""
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    frames = traceback.extract_tb(cause.__traceback__)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    name = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return f"{name}{error}{where}"
