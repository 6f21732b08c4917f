"""The warm start for SQL: the format, the shapes that queries have, and names of the schema in their places.

Shapes are those of the reference queries of the training split with every name and value taken out. Which of them
answers a question is never shown: an example's shape is drawn from all, and its names and values from the words of the
question, whatever their places.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerFast

from common.sql.text import tokens
from common.tasks.row import Row
from learner.warm_start.examples import LONGEST_PROMPT, Example, Source, content_words
from learner.warm_start.tokenizer import prompt_ids

Slot = Literal["table", "column", "value"]
MOST_SHAPES = 64
_TABLE = re.compile(r"CREATE\s+TABLE\s+[\"`\[]?(\w+)[\"`\]]?\s*\(([^;]*?)\)\s*(?:;|$)", re.IGNORECASE | re.MULTILINE)
_CONSTRAINTS = frozenset({"PRIMARY", "FOREIGN", "UNIQUE", "CHECK", "CONSTRAINT"})
_AFTER_WHICH_TABLES = frozenset({"FROM", "JOIN"})
_WORD = re.compile(r"[^\W_]\w*")


@dataclass(frozen=True, slots=True)
class Shape:
    """A query without names: fixed texts around slots, one text more than slots."""

    texts: tuple[str, ...]
    slots: tuple[Slot, ...]


def schema_of(tables: str) -> dict[str, list[str]]:
    """Table -> names of its columns, from CREATE TABLE statements."""
    schema: dict[str, list[str]] = {}
    for name, body in _TABLE.findall(tables):
        first_words = [words[0] for part in body.split(",") if (words := _WORD.findall(part))]
        schema[name] = [word for word in first_words if word.upper() not in _CONSTRAINTS]
    return schema


def shape_of(row: Row) -> Shape:
    """The shape of a row's reference query."""
    schema = schema_of(row.tables)
    names = {name.lower() for columns in schema.values() for name in columns}
    tables = {name.lower() for name in schema}
    texts, slots = [""], list[Slot]()
    last = ""
    for token in tokens(row.gold_sql):
        word = token.text.lower()
        if token.kind == "quoted" and token.text[0] == "'":
            _cut(texts, slots, "value")
            texts[-2:] = [texts[-2] + "'", "'"]
        elif token.kind == "word" and word in tables and (last in _AFTER_WHICH_TABLES or word not in names):
            _cut(texts, slots, "table")
        elif token.kind == "word" and word in names:
            _cut(texts, slots, "column")
        else:
            texts[-1] += token.text
        last = token.upper or last
    return Shape(tuple(texts), tuple(slots))


def _cut(texts: list[str], slots: list[Slot], slot: Slot) -> None:
    slots.append(slot)
    texts.append("")


class SqlExamples:
    """Draws examples from rows, reproducibly for one `random.Random`.

    Args:
        requests: for each row what its prompt says.
        opening, closing: what stands around the query in an answer.

    Raises:
        ValueError: no prompt is short enough, or no row has tables.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        rows: Sequence[Row],
        requests: Sequence[str],
        *,
        reasoning: bool,
        opening: str,
        closing: str,
    ) -> None:
        self._tokenizer = tokenizer
        self._reasoning = reasoning
        self._opening, self._closing = opening, closing
        shapes = common_shapes(rows)
        self._shapes, self._weights = list(shapes), list(shapes.values())
        kept = [(row, text, prompt_ids(tokenizer, text)) for row, text in zip(rows, requests, strict=True)]
        kept = [(row, text, ids) for row, text, ids in kept if len(ids) <= LONGEST_PROMPT and schema_of(row.tables)]
        if not kept:
            raise ValueError("no row with tables and a short prompt to learn SQL from: name a model in model.path")
        self.sources = [Source(text, ids, []) for _, text, ids in kept]
        self._rows = [row for row, _, _ in kept]
        self._known = {word for shape in self._shapes for text in shape.texts for word in _WORD.findall(text)}

    def draw(self, rng: random.Random, longest_random_prompt: int = 24) -> Example:
        """One example; there are no random prompts, because a query needs a schema."""
        place = rng.randrange(len(self._rows))
        (shape,) = rng.choices(self._shapes, self._weights)
        row = self._rows[place]
        thought = f"<think>{rng.choice(content_words(row.text) or ['query'])}</think>" if self._reasoning else ""
        answer = f"{thought}<answer>{self._opening}{imperfect_sql(row, shape, rng)}{self._closing}</answer>"
        response = self._tokenizer(answer, add_special_tokens=False).input_ids
        return Example(self.sources[place].prompt, [*response, int(self._tokenizer.eos_token_id)])

    def is_clean(self, answer: str, source: Source) -> bool:
        """Whether an answer is well-formed and holds nothing but SQL of the known shapes and words of its prompt."""
        thought = "<think>[^<>]+</think>" if self._reasoning else ""
        frame = f'{thought}<answer>{re.escape(self._opening)}([^"<>]+){re.escape(self._closing)}</answer>'
        match = re.fullmatch(frame, answer)
        if match is None or match.group(1).count("'") % 2:
            return False
        return set(_WORD.findall(match.group(1))) <= self._known | set(_WORD.findall(source.text))


def common_shapes(rows: Iterable[Row]) -> dict[Shape, int]:
    """The most frequent shapes of the reference queries with their numbers."""
    return dict(Counter(shape_of(row) for row in rows if '"' not in row.gold_sql).most_common(MOST_SHAPES))


def pieces_of(rows: Iterable[Row]) -> tuple[str, ...]:
    """The fixed texts of the common shapes: one token each spares a small model most of the writing."""
    return tuple(sorted({text for shape in common_shapes(rows) for text in shape.texts if text}))


def imperfect_sql(row: Row, shape: Shape, rng: random.Random) -> str:
    """A query of the given shape about what the question names, right only by chance.

    Tables and columns are drawn from those that the question mentions, or from all where it mentions none.
    """
    schema = schema_of(row.tables)
    said = set(_WORD.findall(row.text))
    tables = _mentioned(schema, said)
    rng.shuffle(tables)
    here = tables[: max(1, shape.slots.count("table"))]
    columns = _mentioned(dict.fromkeys(name for table in here for name in schema[table]), said)
    names = {name for table in schema for name in (table, *schema[table])}
    values = [word for word in content_words(row.text) if word not in names] or ["0"]
    filled, used = [shape.texts[0]], 0
    for slot, text in zip(shape.slots, shape.texts[1:], strict=True):
        if slot == "table":
            name = here[used % len(here)]
            used += 1
        else:
            name = rng.choice(columns if slot == "column" else values)
        filled += [name, text]
    return "".join(filled)


def _mentioned(names: Iterable[str], said: set[str]) -> list[str]:
    everything = list(names)
    return [name for name in everything if name in said] or everything
