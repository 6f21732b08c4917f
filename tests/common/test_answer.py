from __future__ import annotations

import json
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.tasks.answer import FailureReason, ParsedAnswer, ParseFailure, parse_answer

TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
PIECES = [
    *TAGS,
    '{"query": "a"}',
    '{"query":',
    '"x"',
    "}",
    "\\ud800",
    "NaN",
    "```json",
    "\n",
    "\ud800",
    "\x00",
]


def failure(text: str, *, reasoning: bool = True, **options: object) -> str:
    result = parse_answer(text, reasoning=reasoning, **options)  # type: ignore[arg-type]
    assert isinstance(result, ParseFailure), result
    return result.reason


def direct(body: str) -> str:
    return f"<answer>{body}</answer>"


def test_reasoning_form_gives_think_and_query() -> None:
    body = '{\n "query": " aspirin AND (heart OR cardiac) "\n}'
    text = f" <think>\n two words </think>\n<answer>\n{body}\n</answer>\n"
    result = parse_answer(text, reasoning=True)
    assert result == ParsedAnswer(think="two words", query="aspirin AND (heart OR cardiac)")
    assert result.lengths() == {"think_chars": 9, "think_words": 2, "query_chars": 30, "query_words": 5}


def test_direct_form_has_no_think_part() -> None:
    result = parse_answer('<answer>{"query": "aspirin"}</answer>', reasoning=False)
    assert result == ParsedAnswer(think="", query="aspirin")
    assert failure('<think>x</think><answer>{"query": "a"}</answer>', reasoning=False) == "unexpected_tag"
    assert failure('<answer>{"query": "a"}</answer>', reasoning=True) == "missing_tag"


def test_empty_think_part_is_valid_as_in_the_published_reward() -> None:
    assert parse_answer('<think> </think><answer>{"query": "a"}</answer>', reasoning=True) == ParsedAnswer("", "a")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "missing_tag"),
        ("<think>a</think>", "missing_tag"),
        ('<think>a</think><answer>{"query": "a"}', "missing_tag"),
        ('<think><think>a</think><answer>{"query": "a"}</answer>', "repeated_tag"),
        ('<think>a</think><answer>{"query": "a"}</answer></answer>', "repeated_tag"),
        ('<think>a</think><answer>{"query": "</answer>"}</answer>', "repeated_tag"),
        ('<answer>{"query": "a"}</answer><think>a</think>', "tag_order"),
        ('<think><answer>{"query": "a"}</answer></think>', "tag_order"),
        ('Sure! <think>a</think><answer>{"query": "a"}</answer>', "text_outside_tags"),
        ('<think>a</think> so <answer>{"query": "a"}</answer>', "text_outside_tags"),
        ('<think>a</think><answer>{"query": "a"}</answer> done', "text_outside_tags"),
        ('<THINK>a</THINK><answer>{"query": "a"}</answer>', "missing_tag"),
    ],
)
def test_wrong_tags(text: str, reason: str) -> None:
    assert failure(text) == reason


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("", "not_json"),
        ("aspirin", "not_json"),
        ('```json\n{"query": "a"}\n```', "not_json"),
        ("{'query': 'a'}", "not_json"),
        ('{"query": "a"} {"query": "b"}', "not_json"),
        ('{"query": "a",}', "not_json"),
        ('{"query": NaN}', "not_json"),
        ('{"query": "line\nbreak"}', "not_json"),
        ("[" * 20_000, "not_json"),
        ('{"query":' * 3_000, "not_json"),
        ('{"query": ' + "9" * 5_000 + "}", "not_json"),
        ("[]", "not_an_object"),
        ('"query"', "not_an_object"),
        ('{"query": "a", "query": "b"}', "duplicate_key"),
        ('{"query": {"query": "a", "query": "b"}}', "duplicate_key"),
        ("{}", "wrong_keys"),
        ('{"Query": "a"}', "wrong_keys"),
        ('{"query": "a", "why": "b"}', "wrong_keys"),
        ('{"query": null}', "not_a_string"),
        ('{"query": ["a"]}', "not_a_string"),
        ('{"query": {"query": "a"}}', "not_a_string"),
        ('{"query": ""}', "empty_query"),
        ('{"query": " \\n\\t "}', "empty_query"),
        ('{"query": "a\\ud800b"}', "invalid_unicode"),
        ('{"query": "a\\u0000b"}', "control_character"),
        ('{"query": "' + "a" * 4097 + '"}', "query_too_long"),
        ('{"query": "' + "a" * 100_000 + '"}', "query_too_long"),
    ],
)
def test_wrong_answers(body: str, reason: str) -> None:
    assert failure(direct(body), reasoning=False) == reason


def test_text_with_a_lone_surrogate_is_refused_wherever_it_stands() -> None:
    assert failure('<think>\ud800</think><answer>{"query": "a"}</answer>') == "invalid_unicode"


def test_something_that_is_no_text_is_refused() -> None:
    assert failure(None) == "not_text"  # type: ignore[arg-type]


def test_longest_query_may_be_written_in_escapes() -> None:
    query = "\U0001f9ec" * 50
    body = json.dumps({"query": query}, ensure_ascii=True)
    assert parse_answer(direct(body), reasoning=False, max_query_chars=50) == ParsedAnswer("", query)
    assert failure(direct(body), reasoning=False, max_query_chars=49) == "query_too_long"


def test_another_key() -> None:
    assert parse_answer(direct('{"sql": "SELECT 1"}'), reasoning=False, key="sql") == ParsedAnswer("", "SELECT 1")


clean_text = st.text(st.characters(blacklist_categories=["Cs", "Cc"]), max_size=80)
tagless = clean_text.filter(lambda text: not any(tag in text for tag in TAGS))
blank = st.text(" \n\t\r", max_size=5)


@given(
    think=tagless,
    query=tagless.filter(lambda text: text.strip()),
    gaps=st.tuples(blank, blank, blank),
    ascii=st.booleans(),
)
def test_everything_written_in_the_form_is_read_back(
    think: str, query: str, gaps: tuple[str, str, str], ascii: bool
) -> None:
    body = json.dumps({"query": query}, ensure_ascii=ascii)
    before, between, after = gaps
    text = f"{before}<think>{think}</think>{between}<answer>{before}{body}{after}</answer>{after}"
    assert parse_answer(text, reasoning=True) == ParsedAnswer(think.strip(), query.strip())


anything = st.one_of(
    st.text(st.characters(blacklist_categories=[])),
    st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=5)), max_size=12).map("".join),
    st.text(st.characters(blacklist_categories=[])).map(direct),
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.floats(), st.text()),
        lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.sampled_from(["query", "x"]), inner)),
    ).map(lambda value: direct(json.dumps(value))),
)


@given(text=anything, reasoning=st.booleans())
def test_any_text_gives_an_answer_or_a_reason(text: str, reasoning: bool) -> None:
    result = parse_answer(text, reasoning=reasoning)
    if isinstance(result, ParseFailure):
        assert result.reason in get_args(FailureReason)
        return
    result.query.encode()
    result.think.encode()
    assert result.query == result.query.strip() != ""
    assert len(result.query) <= 4096
    tags = TAGS if reasoning else TAGS[2:]
    assert [text.count(tag) for tag in tags] == [1] * len(tags)


@given(text=anything, junk=st.characters(blacklist_categories=["Cs", "Zs", "Cc", "Zl", "Zp"]))
def test_visible_text_outside_the_tags_always_spoils_an_answer(text: str, junk: str) -> None:
    for spoiled in (junk + text, text + junk):
        assert isinstance(parse_answer(spoiled, reasoning=True), ParseFailure)
