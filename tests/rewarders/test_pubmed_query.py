"""The parser of the PubMed query language: left to right, tags, dates, repairs, limits."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewarders.servers.pubmed.query import MAX_DEPTH, MAX_QUERY_CHARACTERS, QuerySyntaxError, parse
from rewarders.servers.pubmed.syntax import Group, Term, translation
from rewarders.servers.text import search_words


def understood(text: str) -> str:
    """The query as esearch would translate it, without the fields of untagged words."""
    root = parse(text).root
    return translation(root).replace("[All Fields]", "") if root else ""


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("heart", '"heart"'),
        ("Heart OR lung AND liver", '"heart" OR "lung" AND "liver"'),
        ("heart OR (lung AND liver)", '"heart" OR ("lung" AND "liver")'),
        ("heart attack", '"heart" AND "attack"'),
        # PubMed takes the words between two operators as one unit.
        ("aspirin OR heart attack", '"aspirin" OR ("heart" AND "attack")'),
        ('"heart attack" aspirin[ti]', '"heart attack" AND "aspirin"[Title]'),
        ("heart attack[ti]", '"heart attack"[Title]'),
        ("heart[Title] lung [ TITLE/abstract ]", '"heart"[Title] AND "lung"[Title/Abstract]'),
        ("neoplas*", '"neoplas*"'),
        ('"breast neoplas*"[tiab]', '"breast neoplas*"[Title/Abstract]'),
        ("can*", '"can"'),
        ("covid-19 vaccine", '"covid 19" AND "vaccine"'),
        ("heart and lung", '"heart" AND "lung"'),
        ("heart/lung, liver;", '"heart" AND "lung" AND "liver"'),
        ("Sjögren’s", '"sjogren s"'),
        ("all[sb] NOT heart", 'all[Filter] NOT "heart"'),
        ("smith j[au] AND heart", '"smith j"[Author] AND "heart"'),
        ("12345[uid] OR x", '12345[UID] OR "x"'),
    ],
)
def test_queries_are_understood_as_pubmed_does(query: str, expected: str) -> None:
    assert understood(query) == expected


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("2010[dp]", "2010/01/01:2010/12/31"),
        ("2010/03[pdat]", "2010/03/01:2010/03/31"),
        ("2000:2010[dp]", "2000/01/01:2010/12/31"),
        ("2000/05/07:2010/02[Date - Publication]", "2000/05/07:2010/02/31"),
        ('("2000"[Date - Publication] : "3000"[Date - Publication])', "2000/01/01:3000/12/31"),
        ("2001[dp]:2003[dp]", "2001/01/01:2003/12/31"),
    ],
)
def test_dates(query: str, expected: str) -> None:
    assert understood(query) == f"{expected}[Date - Publication]"


def test_words_before_a_date_are_a_query_of_their_own() -> None:
    assert understood("heart attack 2010[dp]") == '("heart" AND "attack") AND 2010/01/01:2010/12/31[Date - Publication]'


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("AND heart", '"heart"'),
        ("heart OR", '"heart"'),
        ("heart AND NOT lung", '"heart" NOT "lung"'),
        ("heart AND OR lung", '"heart" OR "lung"'),
        ("NOT heart", 'all[Filter] NOT "heart"'),
        ("heart AND ()", '"heart"'),
        ('"heart attack', '"heart" AND "attack"'),
        ("[ti] heart", '"heart"'),
        ("heart] attack[", '"heart" AND "attack"'),
        ("“heart attack”", '"heart attack"'),
        ("(a1 OR b1)[tiab]", '"a1" OR "b1"'),
        ('"" OR heart', '"heart"'),
        ("***", ""),
    ],
)
def test_malformed_queries_are_repaired(query: str, expected: str) -> None:
    assert understood(query) == expected


def test_repairs_are_recorded() -> None:
    assert parse("heart AND NOT lung OR").repairs == ("AND before NOT dropped", "trailing OR dropped")
    assert parse("heart AND lung").repairs == ()


def test_unknown_tags_and_stopwords_are_reported() -> None:
    parsed = parse("the heart[zz] OR lung")
    assert parsed.unknown_tags == ("[zz]",)
    assert parsed.ignored == ("the",)


@pytest.mark.parametrize("query", ["((", "(heart", "heart)", "(heart AND (lung OR liver)", ")("])
def test_unbalanced_parentheses_are_refused(query: str) -> None:
    with pytest.raises(QuerySyntaxError, match="unbalanced parentheses"):
        parse(query)


def test_depth_and_length_are_limited() -> None:
    deep = "(" * MAX_DEPTH + "heart" + ")" * MAX_DEPTH
    assert understood(deep) == '"heart"'
    with pytest.raises(QuerySyntaxError, match="nested deeper"):
        parse(f"({deep})")
    with pytest.raises(QuerySyntaxError, match="longer than"):
        parse("x" * (MAX_QUERY_CHARACTERS + 1))


def test_long_chains_do_not_deepen_the_tree() -> None:
    root = parse(" OR ".join(f"w{number}" for number in range(2_000))).root
    assert isinstance(root, Group)
    assert len(root.rest) == 1_999
    assert all(isinstance(node, Term) for _, node in root.rest)
    assert translation(root).count(" OR ") == 1_999


_WORDS = (
    "heart",
    "attack",
    "the",
    "not",
    "covid-19",
    "neoplas*",
    "é",
    "µm",
    "2010",
    "2000:2010",
    ":",
    "*",
    ",",
    "\n",
)
_SYNTAX = ("AND", "OR", "NOT", '"', "“", "(", ")", "[", "]", "[ti]", "[tiab]", "[zz]", "[dp]", "[au]")
_PARTS = st.sampled_from(_WORDS + _SYNTAX)


@settings(max_examples=300)
@given(st.lists(_PARTS, max_size=30).map(" ".join) | st.text(max_size=60))
def test_any_text_is_parsed_or_refused_and_its_translation_means_the_same(text: str) -> None:
    try:
        root = parse(text).root
    except QuerySyntaxError:
        return
    if root is not None:
        again = parse(translation(root)).root
        assert again is not None
        assert translation(again) == translation(root)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Sjögren's SYNDROME", ["sjogren", "s", "syndrome"]),
        ("TNF-α (10 µm²)", ["tnf", "α", "10", "μm2"]),
        ("snake_case ﬁbrosis", ["snake", "case", "fibrosis"]),
        ("", []),
    ],
)
def test_search_words(text: str, words: list[str]) -> None:
    assert search_words(text) == words
