"""From a request to the query that a model writes for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from common.tasks import ParseFailure, Row, Task
from common.tasks.answer import ANSWER_TAGS, THINK_TAGS
from common.tasks.answer_pattern import query_opening, query_pattern
from deploy.generation import Draw, Generated, Generator
from deploy.rewriting.results import Rewrite

if TYPE_CHECKING:
    from actors.engine import TextListener

STOP: Final = ANSWER_TAGS[1]
# Of the tokens of a response so many are kept for the answer of a model that is still reasoning, at most half of them;
# the tags that end its reasoning for it are among them.
_ANSWER_TOKENS: Final = 128
_TAG_TOKENS: Final = 16
# Fewer would not always hold one character.
_QUERY_TOKENS: Final = 8


@dataclass(frozen=True)
class Wish:
    """How a request is to be rewritten.

    Attributes:
        n: rewrites of every request; more than one needs a temperature above 0.
        temperature: 0 is greedy decoding.
        top_p: nucleus mass, in (0, 1].
        max_tokens: longest response, reasoning included.
        seed: same seed, same rewrites, as far as the engine can promise.
        guided: hold the model to the form of an answer; an endpoint cannot be held.
    """

    n: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 512
    seed: int | None = None
    guided: bool = True


class TaskRewriter:
    """Rewrites requests for one task."""

    def __init__(self, task: Task, generator: Generator) -> None:
        self.task = task
        self._generator = generator

    async def rewrite(self, row: Row, wish: Wish, listener: TextListener | None = None) -> list[Rewrite]:
        """`wish.n` rewrites. Raises as `Generator.generate`.

        Args:
            listener: told how each text grows; where a response had to be ended, it may begin anew.
        """
        kept = self._kept_for_answer(wish)
        draw = Draw(
            n=wish.n,
            temperature=wish.temperature,
            top_p=wish.top_p if wish.temperature > 0 else 1.0,
            max_tokens=wish.max_tokens - kept,
            seed=wish.seed,
            prefix=self.task.response_prefix,
            stop=STOP,
            pattern=self.task.answer_pattern if wish.guided else "",
            listener=listener,
        )
        generated = await self._generator.generate(self.task.messages(row), draw)
        return [await self._finished(row, number, each, draw, kept) for number, each in enumerate(generated)]

    def _kept_for_answer(self, wish: Wish) -> int:
        return min(_ANSWER_TOKENS, wish.max_tokens // 2) if wish.guided and self.task.reasoning else 0

    async def _finished(self, row: Row, number: int, generated: Generated, draw: Draw, kept: int) -> Rewrite:
        text, tokens = generated.text, generated.tokens
        cut = generated.finish_reason == "length"
        if cut and draw.pattern:
            closed = self.task.closed(text)
            if closed is None:
                closed, more = await self._answered(row, number, text, draw, kept)
                tokens += more
            text = closed
        about: dict[str, Any] = {"request": row.text, "task": self.task.name, "text": text}
        about |= {"cut": cut, "tokens": tokens}
        answer = self.task.parse(text)
        if isinstance(answer, ParseFailure):
            return Rewrite(query="", invalid=answer.reason, **about)
        return Rewrite(query=answer.query, reasoning=answer.think, **about)

    async def _answered(self, row: Row, number: int, text: str, draw: Draw, kept: int) -> tuple[str, int]:
        """The response that was cut before its query, with a query, and how many tokens that took.

        The reasoning is ended for the model, which then has to answer (budget forcing: Muennighoff et al., "s1: Simple
        test-time scaling", arXiv 2501.19393).
        """
        begun = self._thought(text, draw.prefix) + query_opening(self.task.answer_key)
        room = max(_QUERY_TOKENS, kept - _TAG_TOKENS)
        tell = draw.listener
        listener = None if tell is None else lambda _, text: tell(number, begun + text)
        rest = replace(
            draw, n=1, prefix=draw.prefix + begun, max_tokens=room, pattern=query_pattern(), listener=listener
        )
        (query,) = await self._generator.generate(self.task.messages(row), rest)
        whole = begun + query.text
        if query.finish_reason == "length":
            whole = self.task.closed(whole) or whole
        return whole, query.tokens

    def _thought(self, text: str, prefix: str) -> str:
        """The response up to the answer's opening tag, that included where it is not in the prefix."""
        if not self.task.reasoning:
            return "" if self.task.prefill else ANSWER_TAGS[0]
        thought = text.partition(THINK_TAGS[1])[0].rstrip("\N{REPLACEMENT CHARACTER}")
        if THINK_TAGS[0] not in prefix + thought:
            thought = THINK_TAGS[0]
        return f"{thought}{THINK_TAGS[1]}\n{ANSWER_TAGS[0]}"
