"""The Boolean query language of the BM25 server, and its parser.

    query   = all { "OR" all }
    all     = part { ["AND"] "NOT" part | "AND" part }
    part    = { "NOT" } bag
    bag     = item { item }
    item    = word | "a quoted phrase" | prefix* | "(" query ")"

Operators are in upper case; in lower case they are words. Words that stand side by side are one bag of words: a
document with any of them matches, and each one it has adds to its score. So a query without operators means what it
means to `syntax: words`. A bag binds tighter than NOT, NOT tighter than AND, AND tighter than OR. Everything else is
left to the analyzer, which splits at punctuation; what it leaves nothing of (stopwords) counts as if it were not there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

MAX_DEPTH: Final = 32
MAX_PARTS: Final = 1024
MIN_PREFIX: Final = 2


class BooleanSyntaxError(ValueError):
    """The query is none. The message is one line."""


@dataclass(frozen=True, slots=True)
class Words:
    """A bag of words, not yet analyzed."""

    text: str


@dataclass(frozen=True, slots=True)
class Phrase:
    """Words in this order, not yet analyzed."""

    text: str


@dataclass(frozen=True, slots=True)
class Prefix:
    """Any indexed word that begins so (lower case). The index holds stems: `tumours*` finds nothing, `tumo*` does."""

    text: str


@dataclass(frozen=True, slots=True)
class Or:
    """Any of at least two."""

    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class And:
    """All of at least two; a `Not` among them excludes."""

    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Not:
    """Every document that `part` does not match."""

    part: Node


Node = Words | Phrase | Prefix | Or | And | Not

_Kind = Literal["word", "phrase", "prefix", "(", ")", "AND", "OR", "NOT"]
_OPERATORS: Final[dict[str, _Kind]] = {"AND": "AND", "OR": "OR", "NOT": "NOT"}
_TOKEN: Final = re.compile(r"""\s+|(?P<paren>[()])|["“”„](?P<phrase>[^"“”„]*)(?P<end>["“”„])?|(?P<word>[^\s()"“”„]+)""")


@dataclass(frozen=True, slots=True)
class _Token:
    kind: _Kind
    text: str


def parse(text: str) -> Node:
    """The query as a tree. Raises BooleanSyntaxError, which says what is wrong."""
    return _Parser(list(_tokens(text))).whole()


def _tokens(text: str) -> Iterator[_Token]:
    for match in _TOKEN.finditer(text):
        if match["paren"]:
            yield _Token("(" if match["paren"] == "(" else ")", match["paren"])
        elif match["phrase"] is not None:
            if match["end"] is None:
                raise BooleanSyntaxError('a quotation mark is not closed: write "the phrase"')
            yield _Token("phrase", match["phrase"])
        elif word := match["word"]:
            yield from [_Token(_OPERATORS[word], word)] if word in _OPERATORS else _word(word)


def _word(word: str) -> Iterator[_Token]:
    """A word, or a prefix with the words before it (`anti-inflam*`)."""
    bare = word.rstrip("*")
    begin = len(bare)
    while begin and bare[begin - 1].isalnum():  # a regular expression would take quadratic time here
        begin -= 1
    stem = bare[begin:] if len(bare) < len(word) else ""
    if not stem:
        yield _Token("word", word)
        return
    if begin:
        yield _Token("word", bare[:begin])
    if len(stem) < MIN_PREFIX:
        raise BooleanSyntaxError(f"{stem}* is too short: a prefix needs {MIN_PREFIX} letters or digits")
    yield _Token("prefix", stem.lower())


class _Parser:
    def __init__(self, tokens: list[_Token]) -> None:
        if len(tokens) > MAX_PARTS:
            raise BooleanSyntaxError(f"the query has more than {MAX_PARTS} words and operators")
        self._tokens = tokens
        self._next = 0
        self._depth = 0

    def whole(self) -> Node:
        if not self._tokens:
            return Words("")
        tree = self._any()
        if self._peek() is not None:
            raise BooleanSyntaxError("a closing parenthesis has no opening one")
        return tree

    def _peek(self) -> _Kind | None:
        return self._tokens[self._next].kind if self._next < len(self._tokens) else None

    def _take(self) -> _Token:
        self._next += 1
        return self._tokens[self._next - 1]

    def _any(self) -> Node:
        parts = [self._all()]
        while self._peek() == "OR":
            self._take()
            parts.append(self._all())
        return parts[0] if len(parts) == 1 else Or(tuple(parts))

    def _all(self) -> Node:
        parts = [self._part()]
        while self._peek() in ("AND", "NOT"):
            if self._peek() == "AND":
                self._take()
            parts.append(self._part())
        return parts[0] if len(parts) == 1 else And(tuple(parts))

    def _part(self) -> Node:
        negative = False
        while self._peek() == "NOT":
            self._take()
            negative = not negative
        bag = self._bag()
        return Not(bag) if negative else bag

    def _bag(self) -> Node:
        items: list[Node] = []
        while (kind := self._peek()) in ("word", "phrase", "prefix", "("):
            if kind == "(":
                items.append(self._group())
            elif kind == "word":
                items.append(self._words())
            else:
                text = self._take().text
                items.append(Phrase(text) if kind == "phrase" else Prefix(text))
        if not items:
            raise self._missing()
        return items[0] if len(items) == 1 else Or(tuple(items))

    def _words(self) -> Words:
        words = []
        while self._peek() == "word":
            words.append(self._take().text)
        return Words(" ".join(words))

    def _group(self) -> Node:
        self._take()
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise BooleanSyntaxError(f"parentheses are nested more than {MAX_DEPTH} deep")
        tree = self._any()
        if self._peek() != ")":
            raise BooleanSyntaxError("a parenthesis is not closed")
        self._take()
        self._depth -= 1
        return tree

    def _missing(self) -> BooleanSyntaxError:
        kind = self._peek()
        before = self._tokens[self._next - 1].kind if self._next else None
        if before in _OPERATORS:
            return BooleanSyntaxError(f"nothing to search for after {before}")
        if kind in _OPERATORS:
            return BooleanSyntaxError(f"nothing to search for before {kind}")
        if before == "(":
            return BooleanSyntaxError("the parentheses are empty")
        return BooleanSyntaxError("a closing parenthesis has no opening one")
