from __future__ import annotations

import json
import os
import time
import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common.metrics import answers as answers_module
from common.metrics.answers import answer_tokens, first_with_answer, has_answer


def oracle_tokens(text: str) -> list[str]:
    """DPR's token rule written from its definition, character by character, without `regex`."""
    tokens: list[str] = []
    run = ""
    for character in unicodedata.normalize("NFD", text):
        group = unicodedata.category(character)[0]
        if group in "LNM":
            run += character
            continue
        if run:
            tokens.append(run)
            run = ""
        if group not in "ZC":
            tokens.append(character)
    return [token.lower() for token in [*tokens, run] if token]


def oracle(text: str, answers: list[str]) -> bool:
    words = oracle_tokens(text)
    for answer in answers:
        wanted = oracle_tokens(answer)
        places = range(len(words) - len(wanted) + 1)
        if wanted and any(words[place : place + len(wanted)] == wanted for place in places):
            return True
    return False


# Characters that Unicode assigns in every version in use; the tokenizer's tables may be newer than Python's.
characters = st.characters(codec="utf-8", exclude_categories=("Cs", "Cn", "Co"), max_codepoint=0x2FFF)
AWKWARD = (
    *("é", "e\u0301", "İ", "ß", "ſ", "Σ", "σ", "ς", "ΟΔΟΣ", "A.Σ", "\u212a", "\u212b", "ﬁ", "½", "٣", "漢", "字", "한"),
    *("👩\u200d🔬", "\u200b", "\u00a0", "\u2028", "\x00", "\t", "-", "'", "’", "$", "1,000", "the", "a", " ", "  "),
)
awkward = st.sampled_from(AWKWARD)
texts = st.lists(st.one_of(st.text(characters, max_size=4), awkward), max_size=12).map(" ".join) | st.text(
    characters, max_size=30
)


@given(texts)
def test_tokens_equal_the_rule_written_out(text: str) -> None:
    assert answer_tokens(text) == oracle_tokens(text)


@settings(max_examples=300)
@given(texts, st.lists(texts, max_size=3))
@example("A.Σ and more", ["Σ"])
@example("ΟΔΟΣ", ["οδοσ"])
@example("x ς y", ["Σ"])
@example("İstanbul", ["i̇stanbul"])
def test_matching_equals_the_rule_written_out(text: str, answers: list[str]) -> None:
    assert has_answer(text, answers) == oracle(text, answers)


@settings(max_examples=300)
@given(st.data(), texts)
def test_answers_cut_out_of_the_text_equal_the_rule_too(data: st.DataObject, text: str) -> None:
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    piece = data.draw(st.sampled_from([text[start:end], text[start:end].upper(), text[start:end].swapcase()]))
    assert has_answer(text, [piece]) == oracle(text, [piece])


@pytest.mark.parametrize(
    ("text", "answer", "held"),
    [
        ("Wilhelm Conrad Röntgen won it", "wilhelm conrad ro\u0308ntgen", True),  # composed and decomposed
        ("Wilhelm Conrad Rontgen won it", "Röntgen", False),  # marks are not dropped
        ("in the United States of America", "united states", True),
        ("in the united state of affairs", "united states", False),
        ("born in 1999.", "1999", True),
        ("born in 19991", "1999", False),  # whole tokens only
        ("the cat", "cat the", False),  # order counts
        ("cats dogs birds", "cats birds", False),  # nothing in between
        ("July 5 , 2018", "July 5, 2018", True),  # white space does not count
        ("July 5 2018", "July 5, 2018", False),  # punctuation does
        ("a U.S. state", "U.S.", True),
        ("a US state", "U.S.", False),
        ("about 1,000 people", "1,000", True),
        ("about 1.000 people", "1,000", False),
        ("Beatles", "The Beatles", False),  # articles count
        ("state-of-the-art", "of the art", False),  # hyphens are tokens
        ("state of the art", "of the art", True),
        ("he said “no”", "“no”", True),
        ("he said “no”", '"no"', False),
        ("北京市", "北京", False),  # a run of letters is one token
        ("北京 市", "北京", True),
        ("MASSE", "Maße", False),  # lower case, not case folding
        ("snow\u200bball", "snow ball", True),  # a format character separates
        ("x", " \u3000\n", False),  # an answer without a token: in DPR's code every passage holds it
        ("", "x", False),
        ("", "", False),
    ],
)
def test_cases_of_the_rule(text: str, answer: str, held: bool) -> None:
    assert has_answer(text, [answer]) is held
    assert oracle(text, [answer]) is held


def test_any_answer_is_enough_and_none_is_not() -> None:
    assert has_answer("it was MFSK", ["Olivia", " ", "mfsk"])
    assert not has_answer("it was MFSK", ["Olivia", " "])
    assert not has_answer("anything", [])


def test_the_first_passage_is_found_and_no_later_one_is_read() -> None:
    read = []

    def passages():  # type: ignore[no-untyped-def]
        for text in ("nothing", "nor here", "Linda Davis sings", "Linda Davis again"):
            read.append(text)
            yield text

    assert first_with_answer(passages(), ["linda davis"]) == 3
    assert len(read) == 3
    assert first_with_answer(["nothing"], ["linda davis"]) == 0
    assert first_with_answer([], ["linda davis"]) == 0


@pytest.mark.parametrize(
    ("text", "pattern", "found"),
    [
        ("born in 1961 in Hawaii", r"19\d\d", True),
        ("BARACK OBAMA", r"barack\s+obama", True),
        ("Röntgen", "Ro\u0308ntgen", True),
        ("one\ntwo", r"^two$", True),
        ("born in 1861", r"19\d\d", False),
        ("anything", "(unclosed", False),
        ("anything", "*", False),
    ],
)
def test_patterns(text: str, pattern: str, found: bool) -> None:
    assert has_answer(text, [pattern], "regex") is found
    assert first_with_answer(["", text], [pattern], "regex") == (2 if found else 0)


def test_a_pattern_that_backtracks_for_ever_is_given_up() -> None:
    started = time.monotonic()
    assert not has_answer("a" * 60 + "!", [r"(a|aa)+$"], "regex")
    assert time.monotonic() - started < answers_module.PATTERN_TIMEOUT_S + 2.0


def test_three_thousand_passages_without_the_answer_take_milliseconds() -> None:
    passage = "the quick brown fox jumps over the lazy dog near Zürich in 1999 . " * 8
    passages = [f"{passage}{number}" for number in range(3000)]
    started = time.process_time()
    assert first_with_answer(passages, ["Wilhelm Conrad Röntgen"]) == 0
    assert time.process_time() - started < 1.0  # some 0.03 s unloaded; tokenizing each passage takes 0.3 s


@pytest.mark.skipif("DEEPRETRIEVAL_DATA" not in os.environ, reason="DEEPRETRIEVAL_DATA is not set")
def test_real_passages_and_answers() -> None:
    path = Path(os.environ["DEEPRETRIEVAL_DATA"]) / "openqa" / "xquad" / "xquad.en.json"
    paragraphs = [p for article in json.loads(path.read_text())["data"] for p in article["paragraphs"]]
    held = []
    for number, paragraph in enumerate(paragraphs):
        others = paragraphs[(number + 1) % len(paragraphs)]["context"]
        for question in paragraph["qas"]:
            answers = [answer["text"] for answer in question["answers"]]
            held.append(has_answer(paragraph["context"], answers))
            assert held[-1] == oracle(paragraph["context"], answers)
            assert has_answer(others, answers) == oracle(others, answers)
    assert len(held) == 1190
    assert sum(held) / len(held) > 0.98  # a few spans cut a token in two
