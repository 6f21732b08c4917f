"""What matches the pattern is an answer, and a cut text becomes one."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.tasks import ParsedAnswer, load_task
from common.tasks.answer import answer_text, parse_answer
from common.tasks.answer_pattern import answer_pattern, closed_answer

FORMS = [(True, "query"), (False, "query"), (True, "SQL"), (False, "SQL")]


@pytest.mark.parametrize(("reasoning", "key"), FORMS)
def test_whatever_matches_is_an_answer(reasoning: bool, key: str) -> None:
    pattern = re.compile(answer_pattern(reasoning=reasoning, key=key))

    @given(st.from_regex(pattern, fullmatch=True))
    def check(text: str) -> None:
        if text.isprintable() or text.encode("utf-8", "replace").decode() == text:
            assert isinstance(parse_answer(text, reasoning=reasoning, key=key), ParsedAnswer), text

    check()


@pytest.mark.parametrize("reasoning", [True, False])
@pytest.mark.parametrize(
    "query", ['(aspirin OR "acetylsalicylic acid") AND stroke', "a<b", "x < t.y AND a <> 3", "naïve 脳", "a\\b\t\n c/d"]
)
def test_the_answers_that_prompts_show_match(query: str, reasoning: bool) -> None:
    text = answer_text(query, "p<0.05 < a </b>\n" if reasoning else None)
    # The prompts' form has line breaks inside of the think part's tags, which are text of the think part.
    assert re.fullmatch(answer_pattern(reasoning=reasoning), text)


@pytest.mark.parametrize(
    "text",
    [
        '<answer>{"query": ""}</answer>',
        '<answer>{"query": "  "}</answer>',
        '<answer>{"query": "a</answer>"}</answer>',
        '<answer>{"query": "a <think> b"}</answer>',
        '<answer>{"query": "a\nb"}</answer>',
        '<answer>{"query": "a"}</answer> and more',
        'Sure: <answer>{"query": "a"}</answer>',
        '<answer>{"query": "a", "query": "b"}</answer>',
    ],
)
def test_what_is_no_answer_does_not_match(text: str) -> None:
    assert not re.fullmatch(answer_pattern(reasoning=False), text)
    assert not re.fullmatch(answer_pattern(reasoning=True), "<think>a</think>" + text)


@pytest.mark.parametrize("reasoning", [True, False])
def test_after_a_prefix_the_rest_matches(reasoning: bool) -> None:
    task = load_task("publication_search", reasoning=reasoning, prefill=True)
    text = task.answer_text("aspirin AND stroke", "two words")
    assert re.fullmatch(task.answer_pattern, text)
    assert not re.fullmatch(task.answer_pattern, task.response_prefix + text)


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1), st.integers(0))
def test_an_answer_cut_anywhere_is_closed(query: str, cut: int) -> None:
    text = answer_text(query, "because")
    if not re.fullmatch(answer_pattern(reasoning=True), text):
        return
    beginning = text[: cut % (len(text) + 1)]
    closed = closed_answer(beginning)
    if closed is None:  # not one visible character of the query was there
        shown = beginning.partition('{"query": "')[2]
        assert not shown.strip() or shown.strip() in ("\\", "<")
        return
    answer = parse_answer(closed, reasoning=True)
    assert isinstance(answer, ParsedAnswer)
    assert answer.think == "because"
    assert query.strip().startswith(answer.query)


def test_a_cut_before_the_query_cannot_be_closed() -> None:
    assert closed_answer("<think>and so on") is None
    assert closed_answer('<think>a</think>\n<answer>{"query": "') is None
    assert closed_answer('<answer>{"query": " \\') is None
