"""Cuts an Essie query into lexemes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass


class EssieError(ValueError):
    """A query that the service refuses. The message is what it says after `Error parsing query in …: `."""


@dataclass(frozen=True, slots=True)
class Lexeme:
    """kind: `(`, `)`, `AND`, `OR`, `NOT`, `ALL`, `MISSING`, `word`, `quoted`, the name of an operator with brackets,
    or `end`. text: the word, the quoted text, or what is between the brackets."""

    kind: str
    text: str


_KEYWORDS = frozenset({"AND", "OR", "NOT", "ALL", "MISSING"})
_BRACKET_OPERATORS = frozenset({"AREA", "SEARCH", "COVERAGE", "COVER", "EXPANSION", "RANGE", "DISTANCE", "TILT"})
# Commas separate words like white space. A backslash takes its meaning from what follows it.
_LEXEMES = re.compile(
    r"""
    (?P<operator> (?:AREA|SEARCH|COVERAGE|COVER|EXPANSION|RANGE|DISTANCE|TILT) \s* \[ )
        (?P<inside> [^\[\]]* ) (?P<end> \]? )
    | " (?P<quoted> (?:\\.|[^"\\])* ) "
    | (?P<open>\() | (?P<close>\)) | (?P<bracket>[\[\]]) | (?P<stray>")
    | (?P<word> (?:\\.|[^\s()\[\],"\\]|\\$)+ )
    """,
    re.VERBOSE | re.DOTALL,
)
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)


def lexemes_of(text: str) -> Iterator[Lexeme]:
    """Yield the lexemes of a query, and `end` at the end.

    Raises:
        EssieError: a quote or bracket without its partner, or in a place where the language has none.
    """
    before = ""
    for match in _LEXEMES.finditer(text):
        kind = str(match.lastgroup)
        if kind == "end":
            yield _operator(match)
        elif kind in ("open", "close"):
            yield Lexeme(match[0], match[0])
        elif kind == "quoted":
            yield Lexeme(kind, _ESCAPED.sub(r"\1", match[kind]))
        elif kind == "stray":
            raise EssieError(f"token recognition error at: '{text[match.start() :]}'")
        elif kind == "bracket":
            raise EssieError(_misplaced(match[0], before))
        else:
            yield _word(match[kind])
        before = match[0]
    yield Lexeme("end", "<EOF>")


def _operator(match: re.Match[str]) -> Lexeme:
    if not match["end"]:
        raise EssieError("mismatched input '<EOF>' expecting ']'")
    name = match["operator"].rstrip("[").rstrip()
    return Lexeme("COVERAGE" if name == "COVER" else name, match["inside"].strip())


def _word(word: str) -> Lexeme:
    """Operators count in upper case only; behind a backslash they are words."""
    if word in _KEYWORDS:
        return Lexeme(word, word)
    if word in _BRACKET_OPERATORS:
        raise EssieError(f"no viable alternative at input '{word}'")
    return Lexeme("word", _ESCAPED.sub(r"\1", word))


def _misplaced(bracket: str, before: str) -> str:
    if bracket == "]":
        return "extraneous input ']' expecting <EOF>"
    return f"{'mismatched' if before else 'extraneous'} input '[' expecting {{<EOF>, '(', 'NOT', Term}}"
