from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.metrics.ranking import retrieval_metrics
from common.tasks import Hits, ParsedAnswer, ParseFailure, Row, load_task, task_names
from common.tasks.publication_search import PublicationSearch
from common.tasks.reward import SEARCH_TIERS, RewardTable

ANSWER = ParsedAnswer("why", "a query")
ROW = Row("q1", "P: adults with asthma\nI: inhaled steroids\n", ("1", "2", "3", "4"))


def reward_at(recall: Fraction, task: PublicationSearch) -> float:
    """The reward of a search that finds exactly this share of the relevant ids."""
    relevant = [str(number) for number in range(recall.denominator)]
    row = Row("q", "text", tuple(relevant))
    return task.score(row, ANSWER, Hits(relevant[: recall.numerator], recall.numerator)).reward


@pytest.mark.parametrize(
    ("recall", "reward"),
    [
        ("1", 6.0), ("7/10", 6.0), ("699/1000", 5.0), ("1/2", 5.0), ("499/1000", 4.0), ("2/5", 4.0),
        ("399/1000", 2.0), ("3/10", 2.0), ("299/1000", 1.5), ("1/10", 1.5), ("99/1000", 1.1), ("1/20", 1.1),
        ("49/1000", -2.5), ("0", -2.5),
    ],
)  # fmt: skip
def test_totals_of_the_published_tier_table(recall: str, reward: float) -> None:
    assert reward_at(Fraction(recall), PublicationSearch()) == pytest.approx(reward, abs=1e-12)


def test_penalties_of_the_published_table() -> None:
    task = PublicationSearch()
    assert task.malformed_score(ParseFailure("missing_tag")).reward == -4.0
    assert task.refused_score().reward == -3.0


@given(st.fractions(0, 1, max_denominator=300))
def test_tier_edges_are_exact_in_floating_point(recall: Fraction) -> None:
    tiers = {Fraction(str(threshold)): reward for threshold, reward in SEARCH_TIERS}
    reached = [threshold for threshold in tiers if recall >= threshold]
    expected = (tiers[max(reached)] if reached else -3.5) + 1.0
    assert reward_at(recall, PublicationSearch()) == pytest.approx(expected, abs=1e-12)


@given(st.fractions(0, 1, max_denominator=50), st.floats(0, 1))
def test_continuous_reward_and_mixture(recall: Fraction, weight: float) -> None:
    tiers = reward_at(recall, PublicationSearch())
    table = RewardTable(kind="metric", scale=10.0, format_bonus=0.5)
    continuous = reward_at(recall, PublicationSearch(reward=table))
    assert continuous == pytest.approx(0.5 + 10.0 * float(recall))
    mixed = reward_at(recall, PublicationSearch(reward=RewardTable(kind="mixture", scale=5.0, metric_weight=weight)))
    assert mixed == pytest.approx((1 - weight) * (tiers - 1.0) + weight * 5.0 * float(recall) + 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tiers": ()}, "falling"),
        ({"tiers": ((0.5, 1.0), (0.7, 2.0))}, "falling"),
        ({"tiers": ((0.5, 1.0), (0.5, 2.0))}, "falling"),
        ({"tiers": ((1.5, 1.0),)}, "within"),
        ({"tiers": ((0.5, 1.0), (0.0, 0.0))}, "within"),
        ({"tiers": ((0.5, math.nan),)}, "finite"),
        ({"miss": math.inf}, "finite"),
        ({"kind": "ndcg"}, "tiers, metric, mixture"),
        ({"metric_weight": 1.5}, "metric_weight"),
    ],
)
def test_wrong_tables_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardTable(**options)  # type: ignore[arg-type]


def test_recall_counts_distinct_hits_within_the_first_k() -> None:
    hits = ["9", "1", "1", "2", "3"]
    assert retrieval_metrics(hits, ROW.relevant, 3) == {"recall": 0.5, "precision": pytest.approx(2 / 3)}
    assert retrieval_metrics(hits, ROW.relevant, 100) == {"recall": 0.75, "precision": 0.75}
    assert retrieval_metrics([], ROW.relevant, 100) == {"recall": 0.0, "precision": 0.0}
    assert retrieval_metrics(["1"], ["1", "1"], 10) == {"recall": 1.0, "precision": 1.0}


def test_score_names_its_components() -> None:
    score = PublicationSearch(top_k=2).score(ROW, ANSWER, Hits(["1", "9", "2"], 123))
    assert score.metrics == {
        "recall": 0.25,
        "precision": 0.5,
        "results": 123.0,
        "format": 1.0,
        "tier": 0.1,
        "reward_format": 1.0,
        "reward_answer": 0.5,
    }
    assert score.reward == 1.5


def test_full_prompt_explains_the_form_it_parses() -> None:
    for reasoning in (True, False):
        task = PublicationSearch(reasoning=reasoning)
        system, user = task.messages(ROW)
        assert (system["role"], user["role"]) == ("system", "user")
        assert ROW.text.strip() in user["content"]
        assert ("<think>" in system["content"]) is reasoning
        example = system["content"][system["content"].rindex("<think>" if reasoning else "<answer>\n{") :]
        answer = task.parse(example)
        assert isinstance(answer, ParsedAnswer)
        assert answer.query == "your search query"


def test_short_prompt_is_the_bare_request() -> None:
    assert PublicationSearch(prompt="short").messages(ROW) == [{"role": "user", "content": ROW.text}]


def test_prefilled_opening_tag_counts_as_part_of_the_answer() -> None:
    rest = 'why</think><answer>{"query": "a"}</answer>'
    task = PublicationSearch(prefill=True)
    assert task.response_prefix == "<think>\n"
    assert task.parse(rest) == ParsedAnswer("why", "a")
    assert task.parse("<think>" + rest) == ParseFailure("repeated_tag")
    assert PublicationSearch().response_prefix == ""
    assert PublicationSearch(reasoning=False, prefill=True).parse('{"query": "a"}</answer>') == ParsedAnswer("", "a")


def test_tasks_are_found_by_name() -> None:
    assert "publication_search" in task_names()
    task = load_task("publication_search", reasoning=False, top_k=50)
    assert isinstance(task, PublicationSearch)
    assert task.top_k == 50
    with pytest.raises(ValueError, match="did you mean 'publication_search'"):
        load_task("publication_serch")
    with pytest.raises(ValueError, match="colour"):
        load_task("publication_search", colour="red")
    with pytest.raises(ValueError, match="top_k"):
        load_task("publication_search", top_k=0)
