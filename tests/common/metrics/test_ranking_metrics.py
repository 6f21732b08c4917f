from __future__ import annotations

import math

import ir_measures
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ir_measures import RR, P, R, SetF, SetP, SetR, Success, nDCG

from common.metrics.ranking import (
    distinct,
    f_measure,
    hits,
    is_ranking_metric,
    metric_named,
    ndcg,
    precision,
    recall,
    reciprocal_rank,
    retrieval_metrics,
)

documents = st.integers(0, 30).map(lambda number: f"d{number}")
rankings = st.lists(documents, max_size=25)
judgments = st.dictionaries(documents, st.integers(0, 3), min_size=1, max_size=20).filter(
    lambda grades: any(grade > 0 for grade in grades.values())
)
cuts = st.integers(1, 30)


def without_repeats(ranking: list[str]) -> list[str]:
    return [document for place, document in enumerate(ranking) if document not in ranking[:place]]


def oracle(measure: object, ranking: list[str], grades: dict[str, int]) -> float:
    """The measure as ir_measures (trec_eval) computes it; falling scores keep ties out of it."""
    run = [ir_measures.ScoredDoc("q", document, -place) for place, document in enumerate(without_repeats(ranking))]
    qrels = [ir_measures.Qrel("q", document, grade) for document, grade in grades.items()]
    return float(ir_measures.calc_aggregate([measure], qrels, run)[measure])


@settings(deadline=None, max_examples=150)
@given(rankings, judgments, cuts)
def test_metrics_at_a_cut_equal_trec_eval(ranking: list[str], grades: dict[str, int], k: int) -> None:
    ours = {
        R @ k: recall(ranking, grades, k),
        P @ k: precision(ranking, grades, k),
        Success @ k: hits(ranking, grades, k),
        RR @ k: reciprocal_rank(ranking, grades, k),
        nDCG @ k: ndcg(ranking, grades, k),
    }
    for measure, value in ours.items():
        assert value == pytest.approx(oracle(measure, ranking, grades), abs=1e-9), measure


@settings(deadline=None, max_examples=100)
@given(rankings, judgments)
def test_metrics_of_whole_rankings_equal_trec_eval(ranking: list[str], grades: dict[str, int]) -> None:
    ours = {
        SetR: recall(ranking, grades),
        SetP: precision(ranking, grades),
        SetF(beta=1.0): f_measure(precision(ranking, grades), recall(ranking, grades)),
        RR: reciprocal_rank(ranking, grades),
        nDCG: ndcg(ranking, grades),
    }
    for measure, value in ours.items():
        assert value == pytest.approx(oracle(measure, ranking, grades), abs=1e-9), measure


def test_ndcg_has_linear_gain() -> None:
    # (2 + 1 / log2 3) / the same: b, a with gains 2, 1 is ideal; a, b is 0.8597, and 0.7967 with 2^gain - 1.
    assert ndcg(["a", "b"], {"a": 1, "b": 2}, 10) == pytest.approx(0.8597, abs=5e-5)


def test_ndcg_does_not_depend_on_the_order_of_the_judgments() -> None:
    assert ndcg(["a"], {"b": 1, "a": 3}, 1) == ndcg(["a"], {"a": 3, "b": 1}, 1) == 1.0


@pytest.mark.parametrize("metric", [recall, precision, hits, reciprocal_rank, ndcg])
def test_a_repeated_id_counts_once_and_takes_one_place(metric) -> None:  # type: ignore[no-untyped-def]
    grades = {"a": 1, "b": 1, "c": 2}
    assert metric(["x", "x", "a", "a", "x", "b"], grades, 3) == metric(["x", "a", "b"], grades, 3)


def test_distinct_stops_at_the_cut() -> None:
    def endless():  # type: ignore[no-untyped-def]
        number = 0
        while True:
            yield str(number // 2)
            number += 1

    assert distinct(endless(), 3) == ["0", "1", "2"]


@given(st.floats(0.01, 1), st.floats(0.01, 1), st.floats(0.1, 10))
def test_f_measure_lies_between_its_parts(p: float, r: float, beta: float) -> None:
    value = f_measure(p, r, beta)
    assert min(p, r) - 1e-12 <= value <= max(p, r) + 1e-12
    assert f_measure(p, r) == pytest.approx(2 * p * r / (p + r))


def test_f_measure_at_its_edges() -> None:
    assert f_measure(0.0, 0.0) == 0.0
    assert f_measure(1.0, 0.2, 0.5) == pytest.approx(0.5555555555)  # 1.25 * 0.2 / (0.25 + 0.2)
    assert f_measure(1.0, 0.2, 0.0) == 1.0
    assert f_measure(0.2, 1.0, 1e6) == pytest.approx(1.0)


@pytest.mark.parametrize("metric", [recall, ndcg])
def test_nothing_relevant_is_an_error_not_a_zero(metric) -> None:  # type: ignore[no-untyped-def]
    for grades in ({}, {"a": 0}):
        with pytest.raises(ValueError, match="undefined"):
            metric(["a"], grades)
    with pytest.raises(ValueError, match="undefined"):
        retrieval_metrics(["a"], [], 10)


@given(rankings, judgments, cuts)
def test_a_metric_is_found_by_its_name(ranking: list[str], grades: dict[str, int], k: int) -> None:
    assert metric_named(f"recall@{k}")(ranking, grades) == recall(ranking, grades, k)
    assert metric_named(f"ndcg@{k}")(ranking, grades) == ndcg(ranking, grades, k)
    assert metric_named("mrr")(ranking, grades) == reciprocal_rank(ranking, grades)
    assert metric_named("f2")(ranking, grades) == f_measure(precision(ranking, grades), recall(ranking, grades), 2.0)
    assert metric_named("f0.5")(ranking, grades) <= 1.0


@pytest.mark.parametrize("name", ["recal@10", "recall@0", "recall@", "recall@ten", "recall@-1", "ndcg@010x", "f", "F1"])
def test_an_unknown_name_is_refused(name: str) -> None:
    assert not is_ranking_metric(name)
    with pytest.raises(ValueError, match="unknown metric"):
        metric_named(name)


def test_the_closest_name_is_told() -> None:
    with pytest.raises(ValueError, match="did you mean 'recall'"):
        metric_named("recal")


@given(rankings, judgments, cuts)
def test_retrieval_metrics_are_set_metrics_of_the_first_k(ranking: list[str], grades: dict[str, int], k: int) -> None:
    relevant = [document for document, grade in grades.items() if grade > 0]
    found = set(without_repeats(ranking)[:k]) & set(relevant)
    size = min(k, len(set(ranking)))
    expected = {"recall": len(found) / len(relevant), "precision": len(found) / size if size else 0.0}
    assert retrieval_metrics(ranking, relevant, k) == expected
    assert not math.isnan(expected["precision"])
