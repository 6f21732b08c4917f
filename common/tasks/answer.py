"""Strict parser of the text a policy generates: tags around one bare JSON object.

Two forms (DeepRetrieval, arXiv 2503.00223, prompt section):

* reasoning:     ``<think>…</think><answer>{"query": "…"}</answer>``
* no reasoning:  ``<answer>{"query": "…"}</answer>``

Each tag of the form occurs exactly once, in this order, with nothing but whitespace outside; an empty
think part is allowed, as in the paper's reward, which looks at tags only. The parser is total: any text
gives an answer or a failure, never an exception, because model-written text must not be able to stop a
rewarder.

Strict is the default. `strict=False` accepts what the published code of DeepRetrieval accepts too: text outside
the tags, think tags in the form without reasoning, and other keys beside the one that is wanted (of a key given
twice the last value counts). The query itself is checked all the same.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final, Literal

import msgspec

FailureReason = Literal[
    "not_text",
    "invalid_unicode",
    "missing_tag",
    "repeated_tag",
    "unexpected_tag",
    "tag_order",
    "text_outside_tags",
    "not_json",
    "not_an_object",
    "duplicate_key",
    "wrong_keys",
    "not_a_string",
    "control_character",
    "empty_query",
    "query_too_long",
]

# The tags are wrong; with every other reason they are right and what stands between them is no answer.
TAG_FAILURES: Final[frozenset[FailureReason]] = frozenset(
    {
        "not_text",
        "invalid_unicode",
        "missing_tag",
        "repeated_tag",
        "unexpected_tag",
        "tag_order",
        "text_outside_tags",
    }
)

THINK_TAGS: Final = ("<think>", "</think>")
ANSWER_TAGS: Final = ("<answer>", "</answer>")
ALL_TAGS: Final = THINK_TAGS + ANSWER_TAGS

DEFAULT_MAX_QUERY_CHARS: Final = 4096
# One character outside the basic plane may be written as two \uXXXX escapes.
_MAX_ESCAPED_CHARS: Final = 12
_JSON_OVERHEAD_CHARS: Final = 1024
# Unicode category Cc without tab, line feed and carriage return.
_CONTROLS: Final = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


class ParsedAnswer(msgspec.Struct, frozen=True):
    """A well-formed answer.

    think: text between the think tags, stripped ("" in the no-reasoning form).
    query: the query as the engine gets it, stripped, never empty, valid UTF-8.
    """

    think: str
    query: str

    def lengths(self) -> dict[str, float]:
        """Lengths for metrics: characters, and words as runs of non-whitespace, of the think part and the
        query.
        """
        return {
            "think_chars": float(len(self.think)),
            "think_words": float(len(self.think.split())),
            "query_chars": float(len(self.query)),
            "query_words": float(len(self.query.split())),
        }


class ParseFailure(msgspec.Struct, frozen=True):
    """The text breaks the format; `reason` is one of `FailureReason`, short enough to count in metrics."""

    reason: FailureReason


class _DuplicateKeyError(ValueError):
    """A JSON object names a key twice (the standard parser would silently keep the last)."""


def parse_answer(
    text: str,
    *,
    reasoning: bool,
    key: str = "query",
    max_query_chars: int = DEFAULT_MAX_QUERY_CHARS,
    strict: bool = True,
) -> ParsedAnswer | ParseFailure:
    """Parse one generated text; see the module's docstring for the two forms and for `strict`.

    key is the one key the JSON object must have, and the only one; its value must be a non-empty string
    of at most max_query_chars characters. Never raises, whatever `text` is.
    """
    if not isinstance(text, str):
        return ParseFailure("not_text")
    if not _is_utf8(text):
        return ParseFailure("invalid_unicode")
    sections = _split_tags(text, reasoning, strict)
    if isinstance(sections, ParseFailure):
        return sections
    think, body = sections
    query = _parse_object(body, key, max_query_chars, strict)
    if isinstance(query, ParseFailure):
        return query
    return ParsedAnswer(think=think, query=query)


def answer_text(query: str, think: str | None = None, key: str = "query") -> str:
    """The text of an answer, each part on lines of its own: what prompts show and what a model may be taught.

    think None: the form without reasoning. `parse_answer` gives both parts back, unless they hold tags themselves or
    the query is none.
    """
    parts = [] if think is None else [THINK_TAGS[0], think, THINK_TAGS[1]]
    body = json.dumps({key: query}, ensure_ascii=False)
    return "\n".join([*parts, ANSWER_TAGS[0], body, ANSWER_TAGS[1]])


def _is_utf8(text: str) -> bool:
    """False for lone surrogates, which no wire format or engine accepts."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _split_tags(text: str, reasoning: bool, strict: bool) -> tuple[str, str] | ParseFailure:
    """Return (think, answer body), both stripped, or why the tags are wrong."""
    tags = ALL_TAGS if reasoning else ANSWER_TAGS
    for tag in ALL_TAGS:
        found = text.count(tag)
        if strict and tag not in tags and found:
            return ParseFailure("unexpected_tag")
        if tag in tags and found != 1:
            return ParseFailure("repeated_tag" if found else "missing_tag")
    starts = [text.index(tag) for tag in tags]
    if starts != sorted(starts):
        return ParseFailure("tag_order")
    parts: list[str] = []
    rest = text
    for tag in tags:
        before, _, rest = rest.partition(tag)
        parts.append(before.strip())
    parts.append(rest.strip())
    inside, outside = parts[1::2], parts[0::2]
    if strict and any(outside):
        return ParseFailure("text_outside_tags")
    return (inside[0] if reasoning else "", inside[-1])


def _unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise _DuplicateKeyError
    return members


def _reject_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _parse_object(body: str, key: str, max_query_chars: int, strict: bool) -> str | ParseFailure:
    """Return the stripped string under `key` of the JSON object `body`."""
    if len(body) > max_query_chars * _MAX_ESCAPED_CHARS + _JSON_OVERHEAD_CHARS:
        return ParseFailure("query_too_long")
    object_of = _unique_object if strict else dict
    try:
        value = json.loads(body, object_pairs_hook=object_of, parse_constant=_reject_constant)
    except _DuplicateKeyError:
        return ParseFailure("duplicate_key")
    except (ValueError, RecursionError):  # RecursionError: thousands of nested brackets
        return ParseFailure("not_json")
    if not isinstance(value, dict):
        return ParseFailure("not_an_object")
    if key not in value or (strict and len(value) > 1):
        return ParseFailure("wrong_keys")
    query = value[key]
    if not isinstance(query, str):
        return ParseFailure("not_a_string")
    return _check_query(query.strip(), max_query_chars)


def _check_query(query: str, max_query_chars: int) -> str | ParseFailure:
    if not query:
        return ParseFailure("empty_query")
    if len(query) > max_query_chars:
        return ParseFailure("query_too_long")
    if not _is_utf8(query):  # JSON escapes can spell a lone surrogate that the text itself does not hold
        return ParseFailure("invalid_unicode")
    if _CONTROLS.search(query):
        return ParseFailure("control_character")  # a NUL could make an engine fail and look like an outage
    return query
