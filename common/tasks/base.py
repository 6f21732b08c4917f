"""What every task family implements: the prompt, the answer parser, the metric and the reward.

A task is pure: it opens no socket and keeps no state, so a learner, an actor and a rewarder can each
build it from the same config and agree. It imports neither torch nor a tokenizer.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import msgspec

from common.metrics.ranking import distinct, is_ranking_metric, metric_named
from common.tasks.answer import TAG_FAILURES, ParsedAnswer, ParseFailure, answer_text, parse_answer
from common.tasks.answer_pattern import answer_pattern, closed_answer
from common.tasks.outcome import EngineKind, Hits, Outcome
from common.tasks.own_code import is_own, load_function
from common.tasks.prompts import answer_format
from common.tasks.reward import Reward, RewardTable
from common.tasks.row import Row

Message = dict[str, str]
PromptForm = Literal["full", "short"]
Measure = Callable[[Row, ParsedAnswer, Outcome], float]

LENGTHS = frozenset(ParsedAnswer("", "").lengths())


class TaskScore(msgspec.Struct, frozen=True):
    """reward: what the learner trains on. metrics: every component by name, each a finite number: what was
    measured (recall, precision, …), `format` (1 well-formed, 0 not), and the parts of the reward, so that nobody
    has to read them back out of reward values.
    """

    reward: float
    metrics: dict[str, float]


class Task(ABC):
    """One task family. A subclass sets the class attributes and writes `measure`; the rest may stay as it is.

    name: the module's name under common/tasks, or what a user's own task is called. metric: the key of
    `TaskScore.metrics` that evaluations report. measures: every key `measure` may give, if there are more.

    role: opening of the full prompt: who answers, and what the engine understands. request_line: stands above the
    request. think_about: what to reason about. example: placeholder of the answer.

    needs: fields of a `Row` that must be filled. needs_texts: the outcome must hold the texts of the hits. dated:
    the engine gets the row's `max_date`. engines: kinds of engine it works with.
    """

    name: ClassVar[str]
    metric: ClassVar[str]
    measures: frozenset[str] = frozenset()
    answer_key: ClassVar[str] = "query"
    role: str = "You write the one search query that makes the search engine return what the request is about."
    request_line: str = "Find what this request asks for:"
    think_about: ClassVar[str] = "which terms matter"
    example: ClassVar[str] = "your search query"
    needs: ClassVar[tuple[str, ...]] = ("relevant",)
    needs_texts: ClassVar[bool] = False
    dated: bool = False
    engines: frozenset[EngineKind] = frozenset({"pubmed", "ctgov", "bm25", "dense"})
    default_top_k: int = 1000
    default_reward: RewardTable = RewardTable()

    def __init__(
        self,
        *,
        prompt: PromptForm = "full",
        reasoning: bool = True,
        prefill: bool = False,
        strict: bool = True,
        top_k: int | None = None,
        reward: Reward | Mapping[str, Any] | None = None,
        metrics: Sequence[str] = (),
        role: str = "",
    ) -> None:
        """prompt: "full" explains the task, "short" is the bare request text (for a model warm-started on
        the format). reasoning: the answer has a think part. prefill: the prompt already ends with the opening
        tag. strict: how exact the answer's format must be (`common.tasks.answer`).

        top_k: how many ids the engine is asked for, None: the task's own. reward: changes to the task's own
        table, or another `Reward`. metrics: more of them, as `recall@10` or `my_module:my_function`. role: own
        opening of the full prompt.

        Raises ValueError for values that make no sense, and for a reward or metric that cannot be computed.
        """
        self.prompt = prompt
        self.reasoning = reasoning
        self.prefill = prefill
        self.strict = strict
        self.role = role or self.role
        self._top_k = self.default_top_k if top_k is None else top_k
        if self._top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        if reward is None or isinstance(reward, Mapping):
            reward = self.default_reward.but(reward or {})
        self.reward: Reward = reward
        self._more = self._further_metrics([*metrics, *sorted(reward.metrics)])

    # ------------------------------------------------------------------ the prompt and the answer

    @property
    def response_prefix(self) -> str:
        """Text to append after the chat template's generation prompt; `parse` counts it as part of the
        answer.
        """
        if not self.prefill:
            return ""
        return "<think>\n" if self.reasoning else "<answer>\n"

    def messages(self, row: Row) -> list[Message]:
        """Chat messages, each with keys "role" and "content"."""
        request = self.request(row)
        if self.prompt == "short":
            return [{"role": "user", "content": request}]
        form = answer_format(self.reasoning, self.answer_key, self.example, self.think_about)
        return [
            {"role": "system", "content": f"{self.role}\n\n{form}"},
            {"role": "user", "content": f"{self.request_line}\n{request.strip()}"},
        ]

    def request(self, row: Row) -> str:
        """What the prompt says of the row; all of a short prompt."""
        return row.text

    def parse(self, text: str) -> ParsedAnswer | ParseFailure:
        """Parse generated text (without the prompt, hence without `response_prefix`). Never raises."""
        if not isinstance(text, str):
            return ParseFailure("not_text")
        return parse_answer(
            self.response_prefix + text, reasoning=self.reasoning, key=self.answer_key, strict=self.strict
        )

    @property
    def answer_pattern(self) -> str:
        """Regular expression that an answer matches after `response_prefix`, for guided decoding."""
        return answer_pattern(reasoning=self.reasoning, key=self.answer_key, begun=self.prefill)

    def closed(self, text: str) -> str | None:
        """The answer that a text which began as one becomes by ending its query where it was cut, after
        `response_prefix`; None where it has not come to a query.
        """
        closed = closed_answer(self.response_prefix + text, key=self.answer_key)
        return None if closed is None else closed.removeprefix(self.response_prefix)

    def answer_text(self, query: str, think: str = "") -> str:
        """What a model would have to generate to give this query, after the prompt and `response_prefix`; `think` is
        left out in the form without reasoning. `parse` tells whether the result is an answer.
        """
        text = answer_text(query, think if self.reasoning else None, self.answer_key)
        return text.removeprefix(self.response_prefix)

    # ------------------------------------------------------------------ the score

    @property
    def top_k(self) -> int:
        """How many ids to ask the engine for; the metric looks at no more."""
        return self._top_k

    @abstractmethod
    def measure(self, row: Row, answer: ParsedAnswer, outcome: Outcome) -> dict[str, float]:
        """Metrics of what the engine returned, `metric` among them. A key may be left out where it has no value
        (the rank of what was not found); the reward then counts it as not reached.
        """

    def score(self, row: Row, answer: ParsedAnswer, outcome: Outcome) -> TaskScore:
        """Score a well-formed answer by what the engine returned for it.

        Raises ValueError if the outcome lacks what the task needs, or if a user's own metric gives no finite
        number.
        """
        measured = self._measured(row, answer, outcome)
        grade = self.reward.grade({**answer.lengths(), **measured})
        return TaskScore(grade.total, {**measured, "format": 1.0, **grade.parts})

    def malformed_score(self, failure: ParseFailure) -> TaskScore:
        """Score of a text that does not parse; no search is made for it."""
        tags = failure.reason in TAG_FAILURES
        return TaskScore(self.reward.malformed if tags else self.reward.bad_answer, {"format": 0.0})

    def refused_score(self) -> TaskScore:
        """Score of a well-formed answer whose query the engine refuses (a syntax error, never an outage)."""
        return TaskScore(self.reward.refused, {"format": 1.0, "refused": 1.0})

    def check_row(self, row: Row) -> None:
        """Raises ValueError naming the field that this task needs and the row lacks."""
        missing = [name for name in self.needs if not getattr(row, name)]
        if missing:
            raise ValueError(f"row {row.id!r} has no {missing[0]}, which the task {self.name} is scored by")

    # ------------------------------------------------------------------ inside

    def _measured(self, row: Row, answer: ParsedAnswer, outcome: Outcome) -> dict[str, float]:
        measured = self.measure(row, answer, outcome)
        if isinstance(outcome, Hits):
            measured["results"] = float(outcome.count)
        for name, function in self._more.items():
            try:
                value = function(row, answer, outcome)
            except Exception as error:  # a user's own code may raise anything
                raise ValueError(f"the metric {name} failed on row {row.id!r}: {error!r}") from error
            if not (isinstance(value, (int, float)) and math.isfinite(value)):
                raise ValueError(f"the metric {name} gave {value!r} for row {row.id!r}: it must be a finite number")
            measured[name] = float(value)
        return measured

    def _further_metrics(self, names: Sequence[str]) -> dict[str, Measure]:
        """Functions of the metrics that `measure` does not give. Raises ValueError for a name nobody knows."""
        given = {self.metric, *self.measures, *LENGTHS, "results"}
        functions: dict[str, Measure] = {}
        for name in names:
            if name in given:
                continue
            if is_own(name):
                functions[name] = load_function(name, "metric")
            elif is_ranking_metric(name) and "relevant" in self.needs:
                functions[name] = self._on_hits(name)
            else:
                known = ", ".join(sorted(given))
                raise ValueError(f"task {self.name} has no metric {name!r}: it measures {known}; see docs/rewards.md")
        return functions

    def _on_hits(self, name: str) -> Measure:
        metric = metric_named(name)

        def measure(row: Row, answer: ParsedAnswer, outcome: Outcome) -> float:
            return metric(distinct(ranking_of(self, outcome).ids, self.top_k), row.judgments)

        return measure


def ranking_of(task: Task, outcome: Outcome) -> Hits:
    """The outcome, if it is a ranking with what the task needs. Raises ValueError."""
    if not isinstance(outcome, Hits):
        raise ValueError(f"the task {task.name} scores rankings; engines for it: {', '.join(sorted(task.engines))}")
    if task.needs_texts and outcome.texts is None:
        raise ValueError(f"the task {task.name} needs the texts of the hits, which this engine does not return")
    return outcome
