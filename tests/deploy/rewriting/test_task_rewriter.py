"""A response that is cut becomes an answer; one that is none is said to be none."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import pytest

from common.tasks import Row, load_task
from deploy.generation import Draw, Generated, Generator
from deploy.rewriting.results import Rewrite
from deploy.rewriting.task_rewriter import TaskRewriter, Wish


class Script(Generator):
    """Says what it is told to, and remembers how it was asked."""

    name = "script"

    def __init__(self, *said: tuple[str, str]) -> None:
        self._said = list(said)
        self.draws: list[Draw] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    async def generate(self, messages: Sequence[dict[str, str]] | str, draw: Draw) -> list[Generated]:
        self.draws.append(draw)
        text, reason = self._said.pop(0)
        return [Generated(text, 10, 5, reason)]  # type: ignore[arg-type]


async def rewritten(script: Script, wish: Wish | None = None, **options: Any) -> Rewrite:
    task = load_task("publication_search", **options)
    (rewrite,) = await TaskRewriter(task, script).rewrite(Row("1", "a request"), wish or Wish(max_tokens=100))
    return rewrite


async def test_a_whole_answer() -> None:
    script = Script(('<think>two drugs</think>\n<answer>{"query": "a OR b"}</answer>', "stop"))
    rewrite = await rewritten(script)
    assert (rewrite.query, rewrite.reasoning, rewrite.cut, rewrite.tokens) == ("a OR b", "two drugs", False, 5)
    assert script.draws[0].max_tokens == 50, "half is kept for the answer of a model that reasons for long"


async def test_reasoning_that_does_not_end_is_ended_and_answered() -> None:
    script = Script(("<think>on and on", "length"), ('aspirin"}</answer>', "stop"))
    rewrite = await rewritten(script)
    assert (rewrite.query, rewrite.reasoning, rewrite.cut, rewrite.tokens) == ("aspirin", "on and on", True, 10)
    assert script.draws[1].prefix == '<think>on and on</think>\n<answer>{"query": "'
    assert script.draws[0].max_tokens + script.draws[1].max_tokens <= 100


async def test_an_answer_that_does_not_end_either_is_closed() -> None:
    script = Script(("<think>on", "length"), ("aspirin OR (stroke", "length"))
    rewrite = await rewritten(script)
    assert (rewrite.query, rewrite.reasoning, rewrite.cut) == ("aspirin OR (stroke", "on", True)


async def test_a_cut_before_the_query_is_gone_on_from() -> None:
    script = Script(('<answer>{"qu', "length"), ('aspirin"}</answer>', "stop"))
    rewrite = await rewritten(script, reasoning=False)
    assert (rewrite.query, script.draws[1].prefix) == ("aspirin", '<answer>{"query": "')


@pytest.mark.parametrize("reasoning", [True, False])
async def test_a_begun_answer_goes_on_from_its_prefix(reasoning: bool) -> None:
    text = 'because</think>\n<answer>{"query": "a' if reasoning else '{"query": "a'
    script = Script((text, "length"))
    rewrite = await rewritten(script, reasoning=reasoning, prefill=True)
    assert (rewrite.query, rewrite.cut, len(script.draws)) == ("a", True, 1)


async def test_nothing_is_mended_where_the_model_is_free() -> None:
    script = Script(('<think>a</think><answer>{"query": "a', "length"))
    rewrite = await rewritten(script, Wish(max_tokens=100, guided=False))
    assert (rewrite.query, rewrite.invalid, rewrite.cut) == ("", "missing_tag", True)
    assert script.draws[0].pattern == ""
    assert script.draws[0].max_tokens == 100
