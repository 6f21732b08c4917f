"""Requests with the answers to teach: what a supervised warm start learns from.

A line has a request, as `common.data.rows` has it or as the chat messages of a prompt of one's own, and beside it
`reasoning` and the answer under the task's own key (`query`, or `sql`):

    {"text": "does aspirin prevent stroke", "reasoning": "Both have synonyms …", "query": "aspirin AND stroke"}
    {"messages": [{"role": "user", "content": "…"}], "reasoning": "…", "query": "…"}

What SQL rows have as `gold_sql` is the answer where there is no `sql`, so that rows/train.jsonl of a prepared data set
can be learned from as it is (without reasoning).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from common.data.beir import DataError
from common.data.originals.own_rows import typed_row
from common.data.originals.raw_files import json_objects
from common.tasks import Message, ParseFailure, Task

_GOLD: Final = {"sql": "gold_sql"}  # answer key -> field of a row that holds a right answer


class Demonstration(msgspec.Struct, frozen=True):
    """messages: of the prompt. answer: what the model is to generate after it and the task's `response_prefix`."""

    messages: list[Message]
    answer: str


class _ChatMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: Literal["system", "user", "assistant"]
    content: str


def read_demonstrations(path: Path, task: Task) -> list[Demonstration]:
    """The lines of a .jsonl file (or the entries of a .json list), prompts and answers in the form of `task`.

    Raises:
        DataError: naming the first line that is none, or whose answer the task's own parser would not accept.
    """
    found = [_demonstration(fields, place, task) for place, fields in json_objects(path)]
    if not found:
        raise DataError(f"{path} holds no row to learn from")
    return found


def _demonstration(fields: dict[str, Any], place: str, task: Task) -> Demonstration:
    think = fields.pop("reasoning", None)
    answer = fields.pop(task.answer_key, None) or fields.get(_GOLD.get(task.answer_key, ""))
    messages = fields.pop("messages", None)
    if not isinstance(answer, str):
        raise DataError(f"{place}: no text under {task.answer_key!r}, which is where the task {task.name} answers")
    if task.reasoning and not (isinstance(think, str) and think.strip()):
        raise DataError(f"{place}: no text under 'reasoning': add it, or teach plain answers: task.reasoning=false")
    row = typed_row({"text": "", **fields}, "row", {}, place)
    if messages is None and not row.text.strip():
        raise DataError(f"{place}: no request: give it text, or the messages of a prompt")
    prompt = task.messages(row) if messages is None else _checked_messages(messages, place)
    text = task.answer_text(answer.strip(), think.strip() if isinstance(think, str) else "")
    parsed = task.parse(text)
    if isinstance(parsed, ParseFailure):
        raise DataError(f"{place}: this would be no valid answer ({parsed.reason}): mend the reasoning or the answer")
    return Demonstration(prompt, text)


def _checked_messages(value: Any, place: str) -> list[Message]:
    try:
        messages = msgspec.convert(value, list[_ChatMessage])
    except msgspec.ValidationError as error:
        raise DataError(f"{place}: messages: {error}: each has role and content, both text") from None
    if not messages or messages[-1].role != "user":
        raise DataError(f"{place}: messages end with the user's request; what to answer stands beside them")
    return [msgspec.to_builtins(message) for message in messages]
