from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.metrics.ranking import f_measure, ndcg, precision, recall
from common.tasks import Hits, ParsedAnswer, RewardTable, Row, Task, load_task
from common.tasks.reward import Cost, Grade

ROW = Row("q1", "a request", relevant=("1", "2", "3", "4"))
HITS = Hits(("1", "9", "8", "2", "7"), 5)
ANSWER = ParsedAnswer("why", "heart OR lung OR liver")


def score_with(reward: dict[str, object], task: str = "publication_search", **options: object) -> float:
    return load_task(task, reward=reward, **options).score(ROW, ANSWER, HITS).reward


def test_continuous_recall() -> None:
    assert score_with({"kind": "metric", "scale": 4.0}) == 1.0 + 4.0 * 0.5
    assert score_with({"kind": "mixture", "scale": 4.0, "metric_weight": 0.25}) == 1.0 + 0.25 * 2.0 + 0.75 * 4.0


def test_top_k_mixture() -> None:
    mixture = {"recall@1": 0.5, "recall@5": 0.25, "ndcg@5": 0.25}
    expected = 0.5 * 0.25 + 0.25 * 0.5 + 0.25 * ndcg(HITS.ids, ROW.judgments, 5)
    assert score_with({"kind": "metric", "metric": mixture}) == pytest.approx(1.0 + expected)


def test_tiers_of_a_mixture() -> None:
    reward = {"metric": {"recall@1": 1.0, "recall@5": 1.0}, "tiers": [(1.5, 9.0), (0.75, 7.0)], "miss": -1.0}
    assert score_with(reward) == 8.0  # 0.25 + 0.5 reaches 0.75
    with pytest.raises(ValueError, match=r"within \(0, 2\]"):
        score_with({**reward, "tiers": [(2.5, 9.0)]})


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_precision_aware_f_measure(beta: float) -> None:
    expected = f_measure(precision(HITS.ids, ROW.judgments), recall(HITS.ids, ROW.judgments), beta)
    assert score_with({"kind": "metric", "metric": f"f{beta:g}"}) == pytest.approx(1.0 + expected)


def test_metrics_look_at_no_more_than_top_k() -> None:
    task = load_task("publication_search", top_k=2, metrics=["mrr", "recall@5"])
    metrics = task.score(ROW, ANSWER, HITS).metrics
    assert (metrics["recall"], metrics["recall@5"], metrics["mrr"]) == (0.25, 0.25, 1.0)


def test_a_longer_query_costs_more() -> None:
    reward = {"costs": {"query_words": {"each": 0.5, "free": 3, "most": 2.0}}}
    task = load_task("publication_search", reward=reward)
    rewards = []
    for words in (1, 3, 5, 6, 7, 100):
        score = task.score(ROW, ParsedAnswer("", " ".join(["word"] * words)), HITS)
        rewards.append(score.reward)
        assert score.metrics["reward_cost"] == score.reward - 5.0
    assert rewards == [5.0, 5.0, 4.0, 3.5, 3.0, 3.0]


def test_a_broader_query_costs_more_per_doubling() -> None:
    reward = {"costs": {"results": {"each": 0.25, "free": 100, "most": 1.0, "per": "doubling"}}}
    task = load_task("publication_search", reward=reward)
    rewards = [task.score(ROW, ANSWER, Hits(HITS.ids, count)).reward for count in (5, 100, 200, 400, 10**9)]
    assert rewards == [5.0, 5.0, 4.75, 4.5, 4.0]


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.floats(0, 10), st.sampled_from(["unit", "doubling"]))
def test_costs_are_bounded_and_never_fall(one: float, other: float, most: float, per: str) -> None:
    cost = Cost(each=0.3, free=10.0, most=most, per=per)  # type: ignore[arg-type]
    low, high = sorted((one, other))
    assert 0.0 <= cost.of(low) <= cost.of(high) <= most


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({"metric": "recal"}, "no metric 'recal'"),
        ({"costs": {"words": {"each": 1.0}}}, "no metric 'words'"),
        ({"costs": {"query_words": {"each": -1.0}}}, "not negative"),
        ({"costs": {"results": {"each": 1.0, "per": "doubling"}}}, "doubling of what"),
        ({"costs": {"results": {"each": 1.0, "per": "dozen"}}}, "per"),
        ({"costs": {"results": {"eahc": 1.0}}}, "eahc"),
        ({"metric": {}}, "needs a metric"),
        ({"metric": {"recall": math.nan}}, "finite|falling"),
        ({"colour": "red"}, "colour"),
        ({"miss": "much"}, "miss"),
        ({"json_penalty": math.inf}, "finite"),
    ],
)
def test_what_makes_no_sense_is_refused(reward: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_task("publication_search", reward=reward)


def test_ranks_go_with_tiers_only() -> None:
    with pytest.raises(ValueError, match="mrr"):
        load_task("evidence_seeking", reward={"kind": "metric"})
    with pytest.raises(ValueError, match="rising ranks"):
        load_task("evidence_seeking", reward={"tiers": [(20.0, 1.0), (5.0, 2.0)]})
    task = load_task("evidence_seeking", reward={"kind": "metric", "metric": "mrr", "scale": 2.0})
    hits = Hits(("a", "b"), 2, texts=["no", "the answer is 42"])
    row = Row("q1", "q", answers=("42",))
    assert task.score(row, ANSWER, hits).reward == 2.0
    assert task.score(row, ANSWER, Hits((), 0, texts=[])).reward == 1.0


def test_a_sql_task_has_no_ranking_metrics() -> None:
    with pytest.raises(ValueError, match="no metric 'recall@5'"):
        load_task("text_to_sql", metrics=["recall@5"])


@pytest.mark.parametrize("name", ["publication_search", "ranking", "trial_search"])
@given(ids=st.lists(st.sampled_from("123456789"), max_size=12), words=st.integers(0, 50))
def test_the_parts_add_up_to_the_reward(name: str, ids: list[str], words: int) -> None:
    task = load_task(name, reward={"costs": {"query_words": {"each": 0.1, "free": 5}}})
    score = task.score(ROW, ParsedAnswer("", "w " * words), Hits(ids, len(ids)))
    parts = [value for key, value in score.metrics.items() if key.startswith("reward_")]
    assert len(parts) == 3
    assert score.reward == pytest.approx(sum(parts))
    assert score.metrics["format"] == 1.0


def test_a_bonus_for_gain_only_stays_out_where_nothing_is_earned() -> None:
    table = RewardTable(kind="metric", bonus_needs_gain=True, format_bonus=0.1, bad_query=0.0)
    assert table.grade({"recall": 0.0}) == Grade(0.0, {"reward_format": 0.0, "reward_answer": 0.0})
    assert table.grade({"recall": 0.5}).total == 0.6
    assert table.refused == 0.0


def test_a_price_for_bad_json_follows_the_refused_query_unless_it_is_set() -> None:
    assert RewardTable(bad_query=-2.0, format_bonus=0.5).bad_answer == -1.5
    assert RewardTable(json_penalty=-9.0).bad_answer == -9.0


def test_a_reward_of_another_kind() -> None:
    class Lottery(msgspec.Struct, frozen=True):
        metrics: frozenset[str] = frozenset({"precision"})
        malformed: float = -1.0
        bad_answer: float = -0.5
        refused: float = -0.25

        def grade(self, metrics):  # type: ignore[no-untyped-def]
            return Grade(100.0 * metrics["precision"], {"reward_answer": 100.0 * metrics["precision"]})

    task: Task = load_task("publication_search", reward=Lottery())
    assert task.score(ROW, ANSWER, HITS).reward == pytest.approx(40.0)
    assert task.refused_score().reward == -0.25
