"""Whether a passage holds one of the accepted answers, by the rule of DPR (Karpukhin et al. 2020).

Answer and passage are brought to NFD and cut into tokens: a run of letters, numbers and marks, or any one other
character that is neither a separator nor a control. In lower case, the answer's tokens must stand in the passage
one after the other. Nothing is dropped: articles count, and punctuation marks are tokens.

One difference is meant: an answer without a token (white space only) is held by every passage in DPR's code, and
by none here.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Final, Literal

import regex

AnswerRule = Literal["string", "regex"]

PATTERN_TIMEOUT_S: Final = 0.1  # of one pattern on one passage: backtracking can take for ever
_TOKEN: Final = regex.compile(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]")
_EDGE: Final = "\x00"  # a control character, so never part of a token


class _Needle:
    """The tokens of one answer, ready to be looked for."""

    __slots__ = ("probe", "text")

    def __init__(self, tokens: Sequence[str]) -> None:
        self.text = _joined(tokens)
        # A passage that does not hold the longest token as a bare substring cannot hold the answer. Sigma is left
        # out because its lower case depends on the letters around it.
        safe = [token for token in tokens if not set(token) & {"σ", "ς"}]
        self.probe = max(safe, key=len, default="")


def answer_tokens(text: str) -> list[str]:
    """The tokens of a text, in lower case."""
    return _tokens_of_nfd(unicodedata.normalize("NFD", text))


def has_answer(text: str, answers: Iterable[str], rule: AnswerRule = "string") -> bool:
    """Whether `text` holds one of the answers.

    rule "regex": the answers are patterns, searched without regard to case (CuratedTREC); a pattern that is
    broken or takes too long finds nothing.
    """
    if rule == "regex":
        return any(_finds(pattern, unicodedata.normalize("NFD", text)) for pattern in answers)
    return _holds(text, _needles(tuple(answers)))


def first_with_answer(texts: Iterable[str], answers: Iterable[str], rule: AnswerRule = "string") -> int:
    """Rank, counted from 1, of the first text that holds an answer; 0 if none does.

    Texts after it are not looked at, so `texts` may read passages as it goes.
    """
    if rule == "regex":
        patterns = tuple(answers)
        return next((rank for rank, text in enumerate(texts, 1) if has_answer(text, patterns, rule)), 0)
    needles = _needles(tuple(answers))
    return next((rank for rank, text in enumerate(texts, 1) if _holds(text, needles)), 0)


@lru_cache(maxsize=4096)  # the samples of a group share their answers
def _needles(answers: tuple[str, ...]) -> tuple[_Needle, ...]:
    token_lists = (answer_tokens(answer) for answer in answers)
    return tuple(_Needle(tokens) for tokens in token_lists if tokens)


def _holds(text: str, needles: Sequence[_Needle]) -> bool:
    normalized = unicodedata.normalize("NFD", text)
    lowered = normalized.lower()
    possible = [needle.text for needle in needles if needle.probe in lowered]
    if not possible:
        return False
    haystack = _joined(_tokens_of_nfd(normalized))
    return any(needle in haystack for needle in possible)


def _tokens_of_nfd(normalized: str) -> list[str]:
    # Lowered token by token, as DPR does: the lower case of a final sigma depends on what stands next to it.
    return [token.lower() for token in _TOKEN.findall(normalized)]


def _joined(tokens: Sequence[str]) -> str:
    return f"{_EDGE}{_EDGE.join(tokens)}{_EDGE}"


def _finds(pattern: str, normalized: str) -> bool:
    try:
        compiled = _compiled(unicodedata.normalize("NFD", pattern))
        return compiled is not None and compiled.search(normalized, timeout=PATTERN_TIMEOUT_S) is not None
    except TimeoutError:
        return False


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> regex.Pattern[str] | None:
    try:
        return regex.compile(pattern, regex.IGNORECASE | regex.UNICODE | regex.MULTILINE)
    except (regex.error, RecursionError, OverflowError):
        return None
