"""From a request to its record: by a model's answers, or by a fixed query.

Imports the rewarders' scoring, so nothing that only names an evaluation imports this module.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from actors.engine import mix_seed
from actors.loop import STOP
from common.scores import InvalidOutput, Score, Scored, Unavailable
from common.tasks import Hits, Outcome, ParsedAnswer, Row
from deploy.evaluation.plan import Plan
from deploy.evaluation.records import Apart, QueryRecord, SampleRecord
from deploy.generation import Draw, Generated, GenerationRefused, Generator, PromptTooLong
from rewarders.answerers.base import Answerer, UnusableRowError
from rewarders.engines.base import EngineUnavailable
from rewarders.scoring import Scorer

# Counters of the answerers that together are the queries tried, retries included.
_CALLS: Final = ("cache_misses", "retries", "sql_answered", "sql_refused", "sql_timeouts")


class RankingKeeper(Answerer):
    """Stands before an answerer and remembers what each query of a row returned. One method at a time."""

    def __init__(self, answerer: Answerer) -> None:
        self._answerer = answerer
        self._kept: dict[tuple[str, str], list[str]] = {}

    async def outcome(self, answer: ParsedAnswer, row: Row) -> Outcome:
        outcome = await self._answerer.outcome(answer, row)
        if isinstance(outcome, Hits):
            self._kept[row.id, answer.query] = list(outcome.ids)
        return outcome

    def counters(self) -> dict[str, float]:
        return self._answerer.counters()

    def take(self, row: Row, query: str) -> list[str]:
        """The ids that a query of the row returned, [] for one that was not searched; forgets the row's others."""
        found = self._kept.get((row.id, query), [])
        for key in [key for key in self._kept if key[0] == row.id]:
            del self._kept[key]
        return found


class Judge:
    """Scores what all methods try, a bounded number of requests at a time.

    counted: False where nobody is asked (a replay): the calls are 0.
    """

    def __init__(self, scorer: Scorer, at_once: int, counted: bool = True) -> None:
        self._scorer = scorer
        self._turns = asyncio.Semaphore(at_once)
        self._counted = counted
        self._calls_taken = self._calls()

    async def texts(self, row: Row, texts: Sequence[str]) -> list[Score]:
        """Scores of the samples of one request. Raises FatalScoringError."""
        async with self._turns:
            return await self._scorer.score_group(texts, row)

    async def query(self, row: Row, query: str) -> Score:
        """Score of one query, as if a well-formed answer held it. Raises FatalScoringError."""
        async with self._turns:
            return await self._scorer.score_answer(ParsedAnswer("", query), row)

    def take_calls(self) -> int:
        """Queries tried since the last time this was asked, or since this judge was made."""
        if not self._counted:
            return 0
        total = self._calls()
        calls, self._calls_taken = total - self._calls_taken, total
        return calls

    def _calls(self) -> int:
        counters = self._scorer.answerer.counters()
        return int(sum(counters.get(name, 0.0) for name in _CALLS))


class Method(ABC):
    """Something that is evaluated.

    rankings: where to take the ranking of the first sample from; None where none is kept.
    """

    def __init__(self, judge: Judge, rankings: RankingKeeper | None) -> None:
        self._judge = judge
        self._rankings = rankings

    async def record(self, row: Row, number: int) -> QueryRecord:
        """Evaluate one request; `number` is its place among all. What concerns this request alone is in the record.

        Raises:
            FatalScoringError, EngineError, LaunchError: the evaluation cannot go on.
        """
        try:
            samples = await self._samples(row, number)
        except PromptTooLong as error:
            return self._apart(row, "too_long", error.reason)
        except GenerationRefused as error:
            return self._apart(row, "refused", error.reason)
        except UnusableRowError as error:
            return self._apart(row, "unusable", error.reason)
        except EngineUnavailable as error:
            return self._apart(row, "unavailable", error.reason)
        outage = next((sample for sample in samples if sample.kind == "unavailable"), None)
        if outage is not None:
            return msgspec.structs.replace(self._apart(row, "unavailable", outage.reason), samples=samples)
        ranking = None if self._rankings is None else self._rankings.take(row, samples[0].query)
        return QueryRecord(row.id, row.text, samples, ranking=ranking)

    @abstractmethod
    async def _samples(self, row: Row, number: int) -> list[SampleRecord]: ...

    def _apart(self, row: Row, kind: Apart, reason: str) -> QueryRecord:
        return QueryRecord(row.id, row.text, apart=kind, reason=reason)


class ModelAnswers(Method):
    """The answers of a model."""

    def __init__(self, plan: Plan, generator: Generator, judge: Judge, rankings: RankingKeeper | None) -> None:
        super().__init__(judge, rankings)
        self._plan = plan
        self._generator = generator

    async def _samples(self, row: Row, number: int) -> list[SampleRecord]:
        sampling, prompt = self._plan.sampling, self._plan.prompt_of(row)
        draw = Draw(
            n=sampling.samples,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            seed=mix_seed(sampling.seed, number) % (1 << 31) if sampling.temperature > 0 else None,
            prefix=prompt.prefix,
            stop=STOP,
        )
        generated = await self._generator.generate(prompt.messages, draw)
        # The task adds its own prefix when it reads an answer; of a published one it knows nothing.
        begun = prompt.prefix if self._plan.prompt == "original" else ""
        scores = await self._judge.texts(row, [begun + each.text for each in generated])
        return [sample_record(score, each) for score, each in zip(scores, generated, strict=True)]


class FixedQueries(Method):
    """One query per request, by its id; a request without one is none of this method's."""

    def __init__(self, queries: Mapping[str, str], judge: Judge, rankings: RankingKeeper | None) -> None:
        super().__init__(judge, rankings)
        self._queries = queries

    async def _samples(self, row: Row, number: int) -> list[SampleRecord]:
        query = self._queries[row.id]
        return [sample_record(await self._judge.query(row, query), None, query)]


def sample_record(score: Score, generated: Generated | None, query: str = "") -> SampleRecord:
    """What is kept of one answer."""
    text, tokens = ("", 0) if generated is None else (generated.text, generated.tokens)
    cut = generated is not None and generated.finish_reason == "length"
    match score:
        case Scored():
            return SampleRecord("scored", text, tokens, cut, score.query, "", score.reward, score.metrics)
        case InvalidOutput():
            reason = f"{score.reason}: {score.detail}" if score.detail else score.reason
            return SampleRecord("invalid", text, tokens, cut, score.query, reason, score.reward, score.metrics)
        case Unavailable():
            return SampleRecord("unavailable", text, tokens, cut, query, score.reason)
