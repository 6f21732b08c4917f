"""What every task family implements: the prompt, the answer parser, the metric and the reward.

A task is pure: it opens no socket and keeps no state, so a learner, an actor and a rewarder can each
build it from the same config and agree. It imports neither torch nor a tokenizer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal, Protocol

import msgspec

from common.tasks.answer import ParsedAnswer, ParseFailure, parse_answer

Message = dict[str, str]
PromptForm = Literal["full", "short"]


class TaskRow(Protocol):
    """One request with its judgments; `common.data.beir.QueryRow` is one.

    text: the user's request. relevant: ids of the relevant documents, at least one. max_date: publication
    date (YYYY, YYYY/MM or YYYY/MM/DD) up to which the engine may answer, None for no bound; it keeps the
    engine from returning what was published after the request (leak guard).
    """

    @property
    def text(self) -> str: ...

    @property
    def relevant(self) -> Sequence[str]: ...

    @property
    def max_date(self) -> str | None: ...


class TaskScore(msgspec.Struct, frozen=True):
    """reward: what the learner trains on. metrics: named components (recall, precision, …), each a finite
    number.
    """

    reward: float
    metrics: dict[str, float]


class Task(ABC):
    """One task family. Subclasses set `name` and `metric`, and write the prompt and the score.

    name: the module's name under common/tasks. metric: the key of `TaskScore.metrics` that evaluations
    report.
    """

    name: ClassVar[str]
    metric: ClassVar[str]
    answer_key: ClassVar[str] = "query"

    def __init__(self, *, prompt: PromptForm = "full", reasoning: bool = True, prefill: bool = False) -> None:
        """prompt: "full" explains the task, "short" is the bare request text (for a model warm-started on
        the format).

        reasoning: the answer has a think part. prefill: the prompt already ends with the opening tag.
        """
        self.prompt = prompt
        self.reasoning = reasoning
        self.prefill = prefill

    @property
    def response_prefix(self) -> str:
        """Text to append after the chat template's generation prompt; `parse` counts it as part of the
        answer.
        """
        if not self.prefill:
            return ""
        return "<think>\n" if self.reasoning else "<answer>\n"

    @abstractmethod
    def messages(self, row: TaskRow) -> list[Message]:
        """Chat messages, each with keys "role" and "content"."""

    def parse(self, text: str) -> ParsedAnswer | ParseFailure:
        """Parse generated text (without the prompt, hence without `response_prefix`). Never raises."""
        if not isinstance(text, str):
            return ParseFailure("not_text")
        return parse_answer(self.response_prefix + text, reasoning=self.reasoning, key=self.answer_key)

    @property
    @abstractmethod
    def top_k(self) -> int:
        """How many ids to ask the engine for; the metric looks at no more."""

    @abstractmethod
    def score(self, row: TaskRow, hits: Sequence[str], count: int) -> TaskScore:
        """Score what the engine returned: hits in the engine's order, count = all matches, returned or
        not.
        """

    @property
    @abstractmethod
    def format_reward(self) -> float:
        """Reward of a text that does not parse; no search is made for it."""

    @property
    @abstractmethod
    def bad_query_reward(self) -> float:
        """Reward of a well-formed answer whose query the engine refuses (a syntax error, never an outage)."""
