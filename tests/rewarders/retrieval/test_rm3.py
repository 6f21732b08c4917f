"""The second query of RM3, worked out by hand."""

from __future__ import annotations

import pytest

from rewarders.servers.retrieval.rm3 import FeedbackDocument, expanded_query, relevance_model


def nothing_is_common(term: str) -> bool:
    return False


def test_half_of_the_weight_goes_to_the_query() -> None:
    documents = [FeedbackDocument(3.0, ["flu", "flu", "flu", "virus"]), FeedbackDocument(1.0, ["virus", "host"])]
    # P(t | document) times score: flu 0.75 * 3, virus 0.25 * 3 + 0.5 * 1, host 0.5 * 1; they sum to 4.
    model = {"flu": 2.25 / 4, "virus": 1.25 / 4, "host": 0.5 / 4}
    assert relevance_model(documents, nothing_is_common) == pytest.approx(model)
    found = expanded_query(["flu", "cause", "cause"], documents, nothing_is_common)
    due = {"flu": 0.5 / 3 + model["flu"] / 2, "cause": 1 / 3, "virus": model["virus"] / 2, "host": model["host"] / 2}
    assert found == pytest.approx(due)
    assert sum(found.values()) == pytest.approx(1.0)


def test_ten_terms_of_each_document_and_ten_of_all() -> None:
    first = [f"w{number:02}" for number in range(15)]
    model = relevance_model([FeedbackDocument(2.0, first), FeedbackDocument(1.0, ["zz"] * 3)], nothing_is_common)
    assert list(model) == ["zz", *first[:9]], "1.0 against 0.2 each; of equal ones the first of the alphabet"
    assert sum(model.values()) == pytest.approx(1.0)


def test_what_is_common_or_no_plain_word_is_not_fed_back() -> None:
    terms = ["the", "the", "q", "é", "caf\u00e9", "x" * 21, "x" * 20, "a1"]
    model = relevance_model([FeedbackDocument(1.0, terms)], lambda term: term == "the")
    assert model == pytest.approx({"a1": 0.5, "x" * 20: 0.5})


def test_without_a_document_only_the_query_is_left() -> None:
    assert relevance_model([], nothing_is_common) == {}
    assert relevance_model([FeedbackDocument(1.0, ["é"])], nothing_is_common) == {}
    assert expanded_query(["flu"], [], nothing_is_common) == {"flu": 0.5}
