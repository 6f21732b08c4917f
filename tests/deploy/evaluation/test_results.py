"""The figures, worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from common.statistics import bootstrap_interval
from deploy.evaluation.records import QueryRecord, SampleRecord
from deploy.evaluation.results import Results, differences, results_of_method
from deploy.evaluation.table import markdown, run_lines, shown_methods

QUALITY = ["recall", "hits@10"]


def scored(recall: float, words: float = 2.0, **changes: Any) -> SampleRecord:
    metrics = {"recall": recall, "format": 1.0, "query_words": words}
    return SampleRecord("scored", "text", 5, query="q", reward=recall, metrics=metrics, **changes)


def invalid(reason: str) -> SampleRecord:
    return SampleRecord("invalid", "text", 9, cut=True, reason=reason, reward=-2.0, metrics={"format": 0.0})


RECORDS = [
    QueryRecord("1", "a", [scored(1.0), scored(0.5, words=4.0)], calls=2),
    QueryRecord("2", "b", [invalid("missing_tag"), scored(0.5)], calls=1),
    QueryRecord("3", "c", [invalid("refused_query: unbalanced"), invalid("missing_tag")]),
    QueryRecord("4", "d", [SampleRecord("unavailable", "text", 5, reason="503")], apart="unavailable", calls=3),
]


def test_invalid_answers_are_zero_and_outages_are_in_no_figure() -> None:
    found = results_of_method(RECORDS, QUALITY)
    assert found.queries == 3
    assert found.apart == {"unavailable": 1}
    assert found.metrics["recall"].mean == pytest.approx((0.75 + 0.25 + 0.0) / 3)
    assert found.best["recall"].mean == pytest.approx((1.0 + 0.5 + 0.0) / 3)
    interval = bootstrap_interval([0.75, 0.25, 0.0])
    assert (found.metrics["recall"].low, found.metrics["recall"].high) == (interval.low, interval.high)
    assert found.metrics["hits@10"].mean == 0.0, "nobody measured it"
    assert found.metrics["reward"].mean == pytest.approx((0.75 - 0.75 - 2.0) / 3)
    assert found.metrics["format"].mean == pytest.approx((1.0 + 0.5 + 0.0) / 3)
    assert found.metrics["query_words"].mean == pytest.approx((3.0 + 2.0) / 2), "of answers that could be read"
    assert found.metrics["query_words"].queries == 2
    assert found.invalid == {"missing_tag": 2, "refused_query": 1}
    assert (found.samples, found.cut, found.calls, found.tokens) == (6, 3, 6, 5 + 5 + 9 + 5 + 9 + 9 + 5)


def test_differences_are_paired_by_request() -> None:
    baseline = [
        QueryRecord("3", "c", [scored(0.5)]),
        QueryRecord("1", "a", [scored(0.25)]),
        QueryRecord("2", "b", apart="unavailable"),
        QueryRecord("4", "d", [scored(1.0)]),
    ]
    found = differences(RECORDS, baseline, ["recall"])["recall"]
    assert found.queries == 2
    assert found.mean == pytest.approx(((0.75 - 0.25) + (0.0 - 0.5)) / 2)
    assert (found.low, found.high) == (-0.5, 0.5)


def results() -> Results:
    weak, strong = [QueryRecord("1", "a", [scored(0.25)])], [QueryRecord("1", "a", [scored(0.5)])]
    methods = {"mine": RECORDS, "original": weak, "rarest_1": weak, "rarest_2": strong}
    return Results(
        model="mine",
        task="publication_search",
        engine="pubmed",
        split="test",
        metric="recall",
        quality=QUALITY,
        samples=2,
        temperature=1.0,
        methods={name: results_of_method(found, QUALITY) for name, found in methods.items()},
        differences={name: differences(RECORDS, found, QUALITY) for name, found in methods.items() if name != "mine"},
    )


def test_the_table_has_a_row_for_each_method_and_says_what_is_missing() -> None:
    assert list(shown_methods(results())) == ["mine", "original", "rarest_2"]
    lines = markdown(results()).splitlines()
    head = next(line for line in lines if line.startswith("| method"))
    assert head.split(" | ")[1:4] == ["recall", "hits@10", "best@2 recall"]
    row = next(line for line in lines if line.startswith("| **mine**"))
    assert row.count("|") == head.count("|")
    assert "0.333 [" in row
    assert any("raw request | +0.500* [+0.500, +0.500]" in line for line in lines)
    assert any("1 requests could not be scored" in line for line in lines)
    assert any("2 missing_tag, 1 refused_query" in line for line in lines)


def test_a_run_file_ranks_each_document_once() -> None:
    records = [QueryRecord("1", "a", [scored(1.0)], ranking=["9", "8", "9"]), QueryRecord("2", "b", apart="too_long")]
    assert list(run_lines(records, "my model")) == ["1 Q0 9 1 2 my-model\n", "1 Q0 8 2 1 my-model\n"]
