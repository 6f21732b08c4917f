r"""The texts that `parse_answer` accepts, as a regular expression: what guided decoding holds a model to.

Any text that matches is an answer; not every answer matches, because one way to write it is enough: the JSON object on
one line, escapes only where they are needed, no text outside the tags. The expression has no anchors, lookarounds,
backreferences or bounded repetitions, so that the grammar compilers of inference engines (xgrammar, llguidance,
outlines) all take it.
"""

from __future__ import annotations

import re
from typing import Final

from common.tasks.answer import ALL_TAGS, ANSWER_TAGS, THINK_TAGS

# What JSON wants escaped, and the control characters that no engine may get.
_NOT_IN_JSON: Final = r'"\\\x00-\x1f\x7f-\x9f'
_SPACES: Final = r"\x20\u0085\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_BREAK: Final = r"\n?"


def answer_pattern(*, reasoning: bool, key: str = "query", begun: bool = False) -> str:
    """The expression that a whole answer matches (see `common.tasks.answer` for the two forms).

    begun: the first tag stands before the answer (`Task.response_prefix`).
    """
    answer = rf'{_BREAK}\{{"{re.escape(key)}": "{query_pattern()}'
    if not reasoning:
        return answer if begun else ANSWER_TAGS[0] + answer
    think = rf"{_text_without_tags('')}*{THINK_TAGS[1]}\n?\n?{ANSWER_TAGS[0]}{answer}"
    return think if begun else THINK_TAGS[0] + think


def query_opening(key: str = "query") -> str:
    """What stands between the opening tag and the query."""
    return f'{{"{key}": "'


def query_pattern() -> str:
    """The expression of what follows `query_opening`: a query that is not blank and holds no tag, and the end."""
    character = _text_without_tags(_NOT_IN_JSON, r'\\["\\/nt]')
    return rf'[^<{_NOT_IN_JSON}{_SPACES}]{character}*"\}}{_BREAK}{ANSWER_TAGS[1]}'


def closed_answer(text: str, *, key: str = "query") -> str | None:
    """The answer that a beginning of one becomes by ending its query where it was cut; None where it has none yet.

    text: a beginning of a text that matches `answer_pattern`, cut anywhere.
    """
    opening = re.search(f"{ANSWER_TAGS[0]}{_BREAK}{re.escape(query_opening(key))}", text)
    if opening is None:
        return None
    query = text[opening.end() :]
    ended = re.match(r'((?:[^"\\]|\\.)*)"', query, re.DOTALL)
    whole = ended[1] if ended else _without_partial_tag(_whole_escapes(query))
    return f'{text[: opening.end()]}{whole}"}}{ANSWER_TAGS[1]}' if whole.strip() else None


def _text_without_tags(excluded: str, *more: str) -> str:
    """One piece of a text in which none of the tags occurs: a character, or the beginning of a tag with a character
    that leads away from it. excluded: inside of a character class, what may not occur either. more: other pieces.

    A `<` right after the beginning of a tag is not among the texts (it might begin a tag itself).
    """
    pieces = [rf"[^<{excluded}]"]
    for beginning in sorted({tag[:length] for tag in ALL_TAGS for length in range(1, len(tag))}):
        following = sorted({tag[len(beginning)] for tag in ALL_TAGS if tag.startswith(beginning)})
        pieces.append(f"{beginning}[^<{''.join(following)}{excluded}]")
    return f"(?:{'|'.join([*pieces, *more])})"


def _whole_escapes(text: str) -> str:
    """The text without an escape that was cut in the middle."""
    backslashes = len(text) - len(text.rstrip("\\"))
    return text[:-1] if backslashes % 2 else text


def _without_partial_tag(text: str) -> str:
    """The text without the beginning of a tag at its end, which might have become a tag."""
    for tag in ALL_TAGS:
        for length in range(len(tag) - 1, 0, -1):
            if text.endswith(tag[:length]):
                return text[:-length]
    return text
