"""A brute-force PubMed over token positions: what the index must equal. It shares no code with the server.

A query is written as nested tuples and `text_of` turns it into text, so that the parser is on trial too:
    ("word", word)                   an untagged word, which the whole corpus may lack
    ("run", (word, ...))             several of them in a row
    ("phrase", words, tag, prefix)   quoted words, with a tag or None; prefix truncates the last one
    ("tagged", words, tag)           words without quotes before a tag
    ("dates", first, last)           publication dates, YYYYMMDD
    ("chain", first, ((operator, operand), ...))   read from left to right
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

Query = tuple[Any, ...]

TITLE_TAGS = {"ti", "Title"}
STOPWORDS = {"the", "of", "in", "and", "with"}


@dataclass(frozen=True)
class OracleDocument:
    id: str
    title: str
    abstract: str
    day: int

    def columns(self, tag: str | None) -> list[list[str]]:
        title, abstract = self.title.lower().split(), self.abstract.lower().split()
        return [title] if tag in TITLE_TAGS else [title, abstract]

    def occurrences(self, words: tuple[str, ...], tag: str | None = None, prefix: bool = False) -> int:
        found = 0
        for column in self.columns(tag):
            for start in range(len(column) - len(words) + 1):
                window = column[start : start + len(words)]
                last = window[-1].startswith(words[-1]) if prefix else window[-1] == words[-1]
                found += last and tuple(window[:-1]) == tuple(words[:-1])
        return found


class Oracle:
    def __init__(self, documents: list[OracleDocument]) -> None:
        self.documents = documents

    def ids_by_date(self, query: Query) -> list[str]:
        found = self.evaluate(query) or set()
        ordered = sorted(enumerate(self.documents), key=lambda entry: (-entry[1].day, -entry[0]))
        return [document.id for _, document in ordered if document.id in found]

    def evaluate(self, query: Query) -> set[str] | None:
        """Ids found; None for an operand that PubMed drops because it knows none of its words."""
        kind = query[0]
        if kind == "word":
            return self.words([query[1]], None, droppable=True)
        if kind == "run":
            return self.words(list(query[1]), None, droppable=True)
        if kind == "phrase":
            return self.phrase(query[1], query[2], query[3])
        if kind == "tagged":
            return self.phrase(query[1], query[2], False)
        if kind == "dates":
            return {d.id for d in self.documents if query[1] <= d.day <= query[2]}
        return self.chain(query[1], query[2])

    def chain(self, first: Query, rest: tuple[tuple[str, Query], ...]) -> set[str] | None:
        found = self.evaluate(first)
        for operator, operand in rest:
            right = self.evaluate(operand)
            if right is None:
                continue
            if found is None:
                found = set() if operator == "NOT" else right
            elif operator == "AND":
                found = found & right
            else:
                found = found | right if operator == "OR" else found - right
        return found

    def matching(self, words: tuple[str, ...], tag: str | None, prefix: bool) -> set[str]:
        return {d.id for d in self.documents if d.occurrences(words, tag, prefix)}

    def phrase(self, words: tuple[str, ...], tag: str | None, prefix: bool) -> set[str] | None:
        found = self.matching(words, tag, prefix)
        if found or len(words) == 1:
            return found if found or tag else None
        return self.words(list(words), tag, droppable=tag is None, prefix=prefix)

    def words(self, words: list[str], tag: str | None, droppable: bool, prefix: bool = False) -> set[str] | None:
        found: set[str] | None = None
        for number, word in enumerate(words):
            if droppable and word in STOPWORDS:
                continue
            right = self.matching((word,), tag, prefix and number == len(words) - 1)
            if right or not droppable:
                found = right if found is None else found & right
        return found

    def bm25(self, words: list[str]) -> dict[str, float]:
        """Scores as documented for SQLite FTS5's bm25(): k1 1.2, b 0.75, idf at least 1e-6."""
        lengths = {d.id: sum(map(len, d.columns(None))) for d in self.documents}
        average = sum(lengths.values()) / len(lengths)
        scores = dict.fromkeys(lengths, 0.0)
        for word in words:
            n = len(self.matching((word,), None, False))
            idf = max(math.log((len(lengths) - n + 0.5) / (n + 0.5)), 1e-6)
            for document in self.documents:
                f = document.occurrences((word,))
                norm = 1.2 * (0.25 + 0.75 * lengths[document.id] / average)
                scores[document.id] += idf * f * 2.2 / (f + norm)
        return scores


def text_of(query: Query, inside: bool = False) -> str:
    """The query in PubMed's language, with no more parentheses than its meaning needs."""
    kind = query[0]
    if kind == "word":
        return str(query[1])
    if kind == "run":
        return " ".join(query[1])
    if kind == "phrase":
        star, tag = "*" if query[3] else "", f"[{query[2]}]" if query[2] else ""
        return f'"{" ".join(query[1])}{star}"{tag}'
    if kind == "tagged":
        return f"{' '.join(query[1])}[{query[2]}]"
    if kind == "dates":
        first, last = (f"{day // 10000:04d}/{day // 100 % 100:02d}/{day % 100:02d}" for day in query[1:])
        return f"{first}:{last}[dp]"
    parts = [text_of(query[1], inside=True)]
    for operator, operand in query[2]:
        parts += [operator, text_of(operand, inside=True)]
    return f"({' '.join(parts)})" if inside else " ".join(parts)
