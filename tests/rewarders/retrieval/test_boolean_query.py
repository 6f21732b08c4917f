"""The Boolean query language: what is read how, and what is refused with which words."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewarders.servers.retrieval.boolean_query import (
    MAX_DEPTH,
    MAX_PARTS,
    And,
    BooleanSyntaxError,
    Not,
    Or,
    Phrase,
    Prefix,
    Words,
    parse,
)

A, B, C = Words("a"), Words("b"), Words("c")


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("", Words("")),
        ("heart attack and or not", Words("heart attack and or not")),
        ("a AND b OR c", Or((And((A, B)), C))),
        ("a OR b AND c", Or((A, And((B, C))))),
        ("a b AND c", And((Words("a b"), C))),
        ("a NOT b c", And((A, Not(Words("b c"))))),
        ("a AND NOT b", And((A, Not(B)))),
        ("a OR b NOT c", Or((A, And((B, Not(C)))))),
        ("a OR NOT b", Or((A, Not(B)))),
        ("NOT NOT a", A),
        ("NOT (NOT a)", Not(Not(A))),
        ("(a OR b)AND(c)", And((Or((A, B)), C))),
        ("(a) (b)", Or((A, B))),
        ('a "b c"', Or((A, Phrase("b c")))),
        ("“b c” AND a", And((Phrase("b c"), A))),
        ('"(a AND b"', Phrase("(a AND b")),
        ("Tumo* a", Or((Prefix("tumo"), A))),
        ("anti-inflam** b", Or((Words("anti-"), Prefix("inflam"), B))),
        ("* a", Words("* a")),
        ("il-6 +x -y contents:z", Words("il-6 +x -y contents:z")),
    ],
)
def test_reading(text: str, tree: object) -> None:
    assert parse(text) == tree


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("(a", "a parenthesis is not closed"),
        ("a)", "a closing parenthesis has no opening one"),
        (")", "a closing parenthesis has no opening one"),
        ("()", "the parentheses are empty"),
        ("a AND", "nothing to search for after AND"),
        ("NOT", "nothing to search for after NOT"),
        ("OR a", "nothing to search for before OR"),
        ("(AND a)", "nothing to search for before AND"),
        ("a AND OR b", "nothing to search for after AND"),
        ('a "b', "a quotation mark is not closed"),
        ("a*", "a* is too short"),
        ("a b-c*", "c* is too short"),
        ("(" * (MAX_DEPTH + 1) + "a" + ")" * (MAX_DEPTH + 1), "nested more than"),
        ("a " * (MAX_PARTS + 1), "more than"),
    ],
)
def test_refusing(text: str, reason: str) -> None:
    with pytest.raises(BooleanSyntaxError, match=r".*") as caught:
        parse(text)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_deepest_query_is_read() -> None:
    assert parse("(" * MAX_DEPTH + "a" + ")" * MAX_DEPTH) == A


@given(st.text(alphabet='abAND ORNT()"“*-\n\x00é', max_size=60))
def test_every_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(BooleanSyntaxError):
        parse(text)


@pytest.mark.parametrize("piece", ["a", "*", "a*", "-*", '"', "(", "NOT ", "é", "\x00", " "])
def test_a_long_text_takes_no_time(piece: str) -> None:
    """Quadratic time would take hours."""
    with contextlib.suppress(BooleanSyntaxError):
        parse(piece * 1_000_000)
