"""What a comparator must know of a query's text: order, DISTINCT, and what makes its result change by itself.

A tokenizer is enough for that. It knows SQLite's quotes ('text', "name", `name`, [name]) and both kinds of comments,
so that nothing inside them is taken for SQL.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Final, Literal

import msgspec

Kind = Literal["quoted", "comment", "word", "space", "sign"]
Instability = Literal["random", "clock", "limit_without_order"]

_TOKEN: Final = re.compile(
    r"""
    (?P<quoted> '(?:[^']+|'')*(?:'|\Z) | "(?:[^"]+|"")*(?:"|\Z) | `(?:[^`]+|``)*(?:`|\Z) | \[[^\]]*(?:\]|\Z) )
    | (?P<comment> --[^\n]* | /\*.*?(?:\*/|\Z) )
    | (?P<word> [^\W\d][\w$]* )
    | (?P<space> \s+ )
    | (?P<sign> \d[\w.]* | . )
    """,
    re.DOTALL | re.VERBOSE,
)
_SPLIT_OPERATORS: Final = (("> =", ">="), ("< =", "<="), ("! =", "!="))
_MYSQL_YEAR: Final = re.compile(r"\byear\s*\(\s*curdate\s*\(\s*\)\s*\)", re.IGNORECASE)
_CLOCK_WORDS: Final = frozenset({"CURRENT_DATE", "CURRENT_TIME", "CURRENT_TIMESTAMP"})
_RANDOM_WORDS: Final = frozenset({"RANDOM", "RANDOMBLOB"})


class Token(msgspec.Struct, frozen=True):
    """A piece of a query. upper: the text of a word in capitals, of a sign as it is, "" for everything else."""

    kind: Kind
    text: str

    @property
    def upper(self) -> str:
        if self.kind == "word":
            return self.text.upper()
        return self.text if self.kind == "sign" else ""


def tokens(sql: str) -> list[Token]:
    """Cut `sql` into tokens; joined again they are `sql`. Total: an open quote or comment reaches to the end."""
    found = []
    for match in _TOKEN.finditer(sql):
        kind: Kind = match.lastgroup  # type: ignore[assignment]
        found.append(Token(kind, match.group()))
    return found


def has_top_level_order(sql: str) -> bool:
    """Whether the whole result is ordered: ORDER BY outside all parentheses (hence not in a subquery or a window)."""
    return any(level == 0 and word == "ORDER" and after == "BY" for level, word, after in _words_with_level(sql))


def without_distinct(sql: str) -> str:
    """Take DISTINCT out, wherever it stands, except in the comparison IS [NOT] DISTINCT FROM."""
    kept: list[str] = []
    last = ""
    for token in tokens(sql):
        if token.upper == "DISTINCT" and last not in ("IS", "NOT"):
            continue
        kept.append(token.text)
        if token.kind not in ("space", "comment"):
            last = token.upper
    return "".join(kept)


def repaired(sql: str) -> str:
    """Mend what the Spider evaluator mends, outside quotes and comments: split operators ("> ="), MySQL's current
    year (2020, the year its data were made).
    """
    return "".join(_repair_code(text) if code else text for code, text in _runs(tokens(sql)))


def unstable(sql: str) -> tuple[Instability, ...]:
    """Why the query may answer differently next time: random numbers, the clock, or a LIMIT on rows in no order.

    For a gold query each of these makes rewards noisy. Text alone cannot show that rows tie within an ORDER BY, nor
    which row a bare column beside GROUP BY comes from.
    """
    words = list(_words_with_level(sql))
    reasons: list[Instability] = []
    if any(word in _RANDOM_WORDS and after == "(" for _, word, after in words):
        reasons.append("random")
    quoted_now = any(token.kind == "quoted" and token.text.lower() == "'now'" for token in tokens(sql))
    if quoted_now or any(word in _CLOCK_WORDS for _, word, _ in words):
        reasons.append("clock")
    if _limits_unordered(words):
        reasons.append("limit_without_order")
    return tuple(reasons)


def _words_with_level(sql: str) -> Iterator[tuple[int, str, str]]:
    """Yield (depth of parentheses, word or sign, the one after it), without quotes, comments and spaces."""
    code = [token for token in tokens(sql) if token.kind not in ("space", "comment")]
    level = 0
    for index, token in enumerate(code):
        level += (token.upper == "(") - (token.upper == ")")
        yield level, token.upper, code[index + 1].upper if index + 1 < len(code) else ""


def _limits_unordered(words: Sequence[tuple[int, str, str]]) -> bool:
    """Whether some (sub)query has a LIMIT but no ORDER BY of its own."""
    ordered = [False]
    for _, word, after in words:
        if word == "(":
            ordered.append(False)
        elif word == ")" and len(ordered) > 1:
            ordered.pop()
        elif word == "ORDER" and after == "BY":
            ordered[-1] = True
        elif word == "LIMIT" and not ordered[-1]:
            return True
    return False


def _runs(pieces: Sequence[Token]) -> Iterator[tuple[bool, str]]:
    """Join neighbouring tokens into stretches of (is code, text); quotes and comments are not code."""
    code: list[str] = []
    for piece in pieces:
        if piece.kind in ("quoted", "comment"):
            yield True, "".join(code)
            yield False, piece.text
            code = []
        else:
            code.append(piece.text)
    yield True, "".join(code)


def _repair_code(code: str) -> str:
    for split, whole in _SPLIT_OPERATORS:
        code = code.replace(split, whole)
    return _MYSQL_YEAR.sub("2020", code)
