"""Our default rewards against those of DeepRetrieval's published code, case by case.

`original` is what its code gives, with its faults. Where we differ, the case names the fault, and the table of
faults in docs/rewards.md has a line for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from common.sql.table import Table
from common.tasks import Execution, Hits, Outcome, ParsedAnswer, Row, Task, load_task

DOCS = Path(__file__).parents[3] / "docs" / "rewards.md"
REFUSED = "refused"  # the engine says that the query itself is wrong

THINK = "<think>because</think>"
GOOD = THINK + '<answer>{"query": "a query"}</answer>'
GOOD_SQL = THINK + '<answer>{"sql": "SELECT 1"}</answer>'
SEARCH = ("publication_search", "trial_search")

# Fault of the original -> what it does. Every line stands in docs/rewards.md under the same name.
FAULTS = {
    "empty_answer_rewarded": "nothing between the answer tags earns the format bonus and no penalty",
    "text_outside_tags": "any text around the tags passes",
    "extra_keys": "other keys beside the wanted one pass, and of a key given twice the last counts",
    "think_tags_ignored": "think tags pass in the form without reasoning",
    "failed_search_is_a_miss": "what the engine cannot execute earns 0, as much as a miss",
    "blank_answer_everywhere": "an accepted answer of white space alone is held by every passage",
    "ideal_order": "the ideal order of graded documents is the one in which the data lists them",
    "timeout_is_empty": "a query that is stopped counts as one that returned nothing",
    "writes_are_executed": "a statement that changes the database is run, and counts as one that returned nothing",
}

# Faults of asking the engine, not of scoring: tests/rewarders/test_pubmed_faults.py and test_pubmed_client.py.
# test_sql_answerer.py has the one of BIRD's evaluator.
ELSEWHERE = {"outage_is_punished", "query_in_the_url", "reference_query_takes_time"}


@dataclass(frozen=True)
class Case:
    """One documented case. `ours` differs from `original` only where `fault` says why."""

    name: str
    text: str
    outcome: Outcome | str | None
    original: float
    ours: float | None = None
    fault: str = ""
    row: Row | None = None  # another one than the task's table has


def reward(task: Task, text: str, row: Row, outcome: Outcome | str | None) -> float:
    """What a rewarder does with a text, without the engine."""
    answer = task.parse(text)
    if not isinstance(answer, ParsedAnswer):
        return task.malformed_score(answer).reward
    if outcome == REFUSED:
        return task.refused_score().reward
    assert isinstance(outcome, Hits | Execution)
    return task.score(row, answer, outcome).reward


def check(task: Task, row: Row, case: Case) -> None:
    got = reward(task, case.text, case.row or row, case.outcome)
    if not case.fault:
        assert got == pytest.approx(case.original, abs=1e-12), case.name
        return
    assert case.fault in FAULTS
    assert case.ours is not None
    assert case.ours != pytest.approx(case.original), f"{case.name} is no fault: we do the same"
    assert got == pytest.approx(case.ours, abs=1e-12), case.name


def format_cases(good: str, outcome: Outcome, tags: float, json: float, same: float) -> list[Case]:
    """Format failures, alike in every task but for their price. `same`: what `good` earns with this outcome."""
    body = good.removeprefix(THINK)
    inside = body.removeprefix("<answer>").removesuffix("</answer>")
    strict = {"outcome": outcome, "original": same, "ours": tags, "fault": "text_outside_tags"}
    return [
        Case("good", good, outcome, same),
        Case("white space around everything", f"\n {good.replace('><', '> <')} \n", outcome, same),
        Case("empty think part", good.replace("because", ""), outcome, same),
        Case("no tags", "a query", None, tags),
        Case("empty text", "", None, tags),
        Case("no think tags", body, None, tags),
        Case("no answer tags", THINK + inside, None, tags),
        Case("think not closed", good.replace("</think>", ""), None, tags),
        Case("answer not closed", good.replace("</answer>", ""), None, tags),
        Case("two answers", good + body, None, tags),
        Case("two thoughts", THINK + good, None, tags),
        Case("answer before thought", body + THINK, None, tags),
        Case("crossed tags", good.replace("</think><answer>", "<answer></think>"), None, tags),
        Case("bare query", f"{THINK}<answer>a query</answer>", None, json),
        Case("code fence", f"{THINK}<answer>```json\n{inside}\n```</answer>", None, json),
        Case("broken JSON", f"{THINK}<answer>{inside[:-1]}</answer>", None, json),
        Case("other key", f'{THINK}<answer>{{"text": "a query"}}</answer>', None, json),
        Case("no object", f'{THINK}<answer>["a query"]</answer>', None, json),
        Case("text before", f"Sure! {good}", **strict),  # type: ignore[arg-type]
        Case("text between", good.replace("</think>", "</think> so: "), **strict),  # type: ignore[arg-type]
        Case("text after", f"{good} Done.", **strict),  # type: ignore[arg-type]
        Case(
            "extra key",
            f'{THINK}<answer>{inside[:-1]}, "why": "because"}}</answer>',
            outcome,
            same,
            json,
            "extra_keys",
        ),
        Case("key twice", f"{THINK}<answer>{inside[:-1]}, {inside[1:]}</answer>", outcome, same, json, "extra_keys"),
    ]


# ------------------------------------------------------------------ publications and trials: recall

WANTED = tuple(str(number) for number in range(100))
SEARCH_ROW = Row("q1", "a request", relevant=WANTED)
ALL_FOUND = Hits(WANTED, 100)
RECALL_TOTALS = {
    100: 6.0, 71: 6.0, 70: 6.0, 69: 5.0, 50: 5.0, 49: 4.0, 40: 4.0, 39: 2.0, 30: 2.0, 29: 1.5, 10: 1.5, 9: 1.1,
    5: 1.1, 4: -2.5, 1: -2.5, 0: -2.5,
}  # fmt: skip
SEARCH_CASES = [
    Case("an id returned twice counts once", GOOD, Hits(("0", "0", "1"), 3), -2.5),
    Case("hits in any order", GOOD, Hits(WANTED[69::-1], 70), 6.0),
    Case("more found than wanted", GOOD, Hits((*(f"x{n}" for n in range(2900)), *WANTED), 9000), 6.0),
    Case("nothing returned", GOOD, Hits((), 0), -2.5),
    *(Case(f"recall {found} %", GOOD, Hits(WANTED[:found], found), total) for found, total in RECALL_TOTALS.items()),
    *format_cases(GOOD, ALL_FOUND, -4.0, -3.0, 6.0),
    Case("refused query", GOOD, REFUSED, -3.0),
    Case("query is a number", THINK + '<answer>{"query": 7}</answer>', None, -3.0),
    Case("query is null", THINK + '<answer>{"query": null}</answer>', None, -3.0),
    Case("empty answer", THINK + "<answer></answer>", None, 1.0, -3.0, "empty_answer_rewarded"),
    Case("blank answer", THINK + "<answer> \n</answer>", None, 1.0, -3.0, "empty_answer_rewarded"),
]


@pytest.mark.parametrize("name", SEARCH)
@pytest.mark.parametrize("case", SEARCH_CASES, ids=lambda case: case.name)
def test_publication_and_trial_search(name: str, case: Case) -> None:
    check(load_task(name), SEARCH_ROW, case)


def test_the_cap_of_three_thousand() -> None:
    others = [f"other{number}" for number in range(2998)]
    for name in SEARCH:
        task = load_task(name)
        assert task.top_k == 3000
        assert reward(task, GOOD, Row("q1", "r", relevant=("a", "b")), Hits([*others, "a", "x", "b"], 3001)) == 5.0


# ------------------------------------------------------------------ evidence: rank of the first passage

EVIDENCE_ROW = Row("q1", "a question", answers=("Linda Davis",))


def found_at(rank: int, last: int = 3000) -> Hits:
    texts = ["nothing here"] * last
    if rank:
        texts[rank - 1] = "Does He Love You is sung by linda davis ."
    return Hits([str(number) for number in range(last)], last, texts)


RANK_TOTALS = {1: 6.0, 5: 6.0, 6: 5.0, 20: 5.0, 21: 3.0, 50: 3.0, 51: 2.0, 100: 2.0, 101: 1.5, 1000: 1.5, 1001: 1.1}
EVIDENCE_CASES = [
    *(Case(f"rank {rank}", GOOD, found_at(rank), total) for rank, total in RANK_TOTALS.items()),
    Case("rank 3000", GOOD, found_at(3000), 1.1),
]
BLANK_ROW = Row("q1", "a question", answers=(" ",))
NQ_CASES = [
    *EVIDENCE_CASES,
    Case("blank answer string", GOOD, found_at(0), 6.0, -2.5, "blank_answer_everywhere", BLANK_ROW),
    *format_cases(GOOD, found_at(1), -4.0, -3.0, 6.0),
    Case("rank 3001", GOOD, found_at(3001, 3001), -2.5),
    Case("not found", GOOD, found_at(0), -2.5),
    Case("nothing returned", GOOD, Hits([], 0, []), -2.5),
    Case("refused query", GOOD, REFUSED, -3.0),
    Case("query is a number", THINK + '<answer>{"query": 7}</answer>', None, -3.0),
    Case("empty answer", THINK + "<answer></answer>", None, 1.0, -3.0, "empty_answer_rewarded"),
]
SQUAD_CASES = [
    *EVIDENCE_CASES,
    *format_cases(GOOD, found_at(1), -4.0, -2.0, 6.0),
    Case("not found", GOOD, found_at(0), -1.5),
    Case("refused query", GOOD, REFUSED, -2.0),
    Case("empty answer", THINK + "<answer></answer>", None, 1.0, -2.0, "empty_answer_rewarded"),
]


@pytest.mark.parametrize("dataset", ["nq", "triviaqa"])
@pytest.mark.parametrize("case", NQ_CASES, ids=lambda case: case.name)
def test_evidence_seeking(dataset: str, case: Case) -> None:
    check(load_task("evidence_seeking", dataset=dataset), EVIDENCE_ROW, case)


@pytest.mark.parametrize("case", SQUAD_CASES, ids=lambda case: case.name)
def test_evidence_seeking_on_squad(case: Case) -> None:
    check(load_task("evidence_seeking", dataset="squad"), EVIDENCE_ROW, case)


def test_the_title_counts_as_in_the_original() -> None:
    hits = Hits(["1"], 1, texts=["She sings."], titles=["Linda Davis"])
    assert reward(load_task("evidence_seeking"), GOOD, EVIDENCE_ROW, hits) == 6.0
    assert reward(load_task("evidence_seeking", titles=False), GOOD, EVIDENCE_ROW, hits) == -2.5


# ------------------------------------------------------------------ ranking: nDCG

ONE = Row("q1", "a claim", relevant=("d1",))
GRADED = Row("q1", "a topic", relevant=("d1", "d2", "d3"), grades=(3, 2, 1))
LOG3 = 1.584962500721156  # log2 3
UNSORTED = Row("q1", "a topic", relevant=("d1", "d3"), grades=(1, 3))
LISTED_WRONG = 0.1 + (3 + 1 / LOG3) / (1 + 3 / LOG3)
GRADED_IDEAL = 3 + 2 / LOG3 + 1 / 2
RANKING_CASES = [
    (ONE, Case("first", GOOD, Hits(["d1", "x"], 2), 1.1)),
    (ONE, Case("second", GOOD, Hits(["x", "d1"], 2), 0.1 + 1 / LOG3)),
    (ONE, Case("third", GOOD, Hits(["x", "y", "d1"], 3), 0.6)),
    (ONE, Case("last within 50", GOOD, Hits([f"x{n}" for n in range(49)] + ["d1"], 50), 0.1 + 1 / 5.672425341971495)),
    (ONE, Case("beyond 50", GOOD, Hits([f"x{n}" for n in range(50)] + ["d1"], 51), 0.0)),
    (ONE, Case("nothing relevant", GOOD, Hits(["x", "y"], 2), 0.0)),
    (ONE, Case("nothing returned", GOOD, Hits([], 0), 0.0)),
    (GRADED, Case("ideal order", GOOD, Hits(["d1", "d2", "d3"], 3), 1.1)),
    (GRADED, Case("reversed", GOOD, Hits(["d3", "d2", "d1"], 3), 0.1 + (1 + 2 / LOG3 + 3 / 2) / GRADED_IDEAL)),
    (GRADED, Case("worst of three", GOOD, Hits(["d3"], 1), 0.1 + 1 / GRADED_IDEAL)),
    (GRADED, Case("listed worst first", GOOD, Hits(["d3", "d1"], 2), LISTED_WRONG, 1.1, "ideal_order", UNSORTED)),
    (ONE, Case("empty answer", THINK + "<answer></answer>", None, -2.0)),
    (
        ONE,
        Case(
            "query is a number", THINK + '<answer>{"query": 7}</answer>', REFUSED, 0.0, -2.0, "failed_search_is_a_miss"
        ),
    ),
    *((ONE, case) for case in format_cases(GOOD, Hits(["d1"], 1), -2.0, -2.0, 1.1)),
]


@pytest.mark.parametrize("retriever", ["bm25", "bm25_boolean"])
@pytest.mark.parametrize(("row", "case"), RANKING_CASES, ids=lambda value: getattr(value, "name", ""))
def test_ranking_on_scifact(retriever: str, row: Row, case: Case) -> None:
    check(load_task("ranking", dataset="scifact", retriever=retriever), row, case)


@pytest.mark.parametrize(
    ("dataset", "sparse", "dense"),
    [
        ("scifact", 50, 1000),
        ("nfcorpus", 1000, 100),
        ("fever", 1000, 1000),
        ("hotpotqa", 3000, 1000),
        ("fiqa", 1000, 1000),
        ("msmarco_beir", 1000, 1000),
        ("msmarco_health", 10, 10),
        ("msmarco_science", 10, 10),
        ("msmarco_tech", 10, 10),
    ],
)
def test_cut_offs_of_the_ranking_reward(dataset: str, sparse: int, dense: int) -> None:
    for retriever, k in (("bm25", sparse), ("dense", dense)):
        task = load_task("ranking", dataset=dataset, retriever=retriever)
        assert task.top_k == k
        misses = [f"x{number}" for number in range(k - 1)]
        last = reward(task, GOOD, ONE, Hits([*misses, "d1"], k))
        assert 0.1 < last <= 1.1
        assert reward(task, GOOD, ONE, Hits([*misses, "x", "d1"], k + 1)) == 0.0


def test_validation_reports_ndcg_at_10() -> None:
    task = load_task("ranking", dataset="hotpotqa")
    answer = ParsedAnswer("", "a query")
    hits = Hits([f"x{number}" for number in range(10)] + ["d1"], 11)
    score = task.score(ONE, answer, hits)
    assert (task.metric, score.metrics["ndcg@10"]) == ("ndcg@10", 0.0)
    assert score.metrics["ndcg@3000"] > 0.0


# ------------------------------------------------------------------ SQL: execution

SQL_ROW = Row("q1", "how many?", database="shop", gold_sql="SELECT 1")
GOLD = Table(("n",), ((1,), (2,)))


def ran(*rows: tuple[object, ...], gold: Table = GOLD) -> Execution:
    return Execution("ok", table=Table(("n",), rows), gold=gold)  # type: ignore[arg-type]


EMPTY = Table(("n",), ())
FORBIDDEN = Execution("refused", detail="not allowed: DELETE")
EQUAL_CASES = [
    Case("equal", GOOD_SQL, ran((1,), (2,)), 1.1),
    Case("other order", GOOD_SQL, ran((2,), (1,)), 1.1),
    Case("repeated rows", GOOD_SQL, ran((1,), (2,), (2,)), 1.1),
    Case("equal numbers of two types", GOOD_SQL, ran((1.0,), (2,)), 1.1),
    Case("both empty", GOOD_SQL, ran(gold=EMPTY), 1.1),
    Case("syntax error", GOOD_SQL, Execution("refused", detail='near "SELEC": syntax error'), 0.0),
    Case("empty answer", THINK + "<answer></answer>", None, -2.0),
]
BIRD_CASES = [
    *EQUAL_CASES,
    *format_cases(GOOD_SQL, ran((1,), (2,)), -2.0, -2.0, 1.1),
    Case("wrong rows", GOOD_SQL, ran((1,)), 0.4),
    Case("nothing returned", GOOD_SQL, ran(), 0.4),
    Case("columns in another order", GOOD_SQL, ran((2, 1), gold=Table(("a", "b"), ((1, 2),))), 0.4),
    Case("no such column", GOOD_SQL, Execution("refused", detail="no such column: x"), 0.0),
    Case("stopped", GOOD_SQL, Execution("timeout"), 0.4, 0.0, "timeout_is_empty"),
    Case("a write", GOOD_SQL, FORBIDDEN, 0.4, 0.0, "writes_are_executed"),
    Case("SQL is a number", THINK + '<answer>{"sql": 7}</answer>', REFUSED, 0.0, -2.0, "failed_search_is_a_miss"),
]
SPIDER_CASES = [
    *EQUAL_CASES,
    *format_cases(GOOD_SQL, ran((1,), (2,)), -2.0, -2.0, 1.1),
    Case("wrong rows", GOOD_SQL, ran((1,)), 0.0),
    Case("no such column", GOOD_SQL, Execution("refused", detail="no such column: x"), 0.0),
]


@pytest.mark.parametrize("case", BIRD_CASES, ids=lambda case: case.name)
def test_text_to_sql_on_bird(case: Case) -> None:
    check(load_task("text_to_sql", dataset="bird"), SQL_ROW, case)


@pytest.mark.parametrize("case", SPIDER_CASES, ids=lambda case: case.name)
def test_text_to_sql_on_spider(case: Case) -> None:
    check(load_task("text_to_sql", dataset="spider"), SQL_ROW, case)


def test_a_stopped_query_does_not_equal_an_empty_gold_result() -> None:
    # The original turns a timeout into an empty list: 1.1 where the reference query returns nothing.
    task = load_task("text_to_sql", dataset="spider")
    assert reward(task, GOOD_SQL, SQL_ROW, Execution("timeout", gold=EMPTY)) == 0.0


WITHOUT_REASONING = GOOD_SQL.removeprefix(THINK)
BIRD_CASES_WITHOUT_REASONING = [
    Case("equal", WITHOUT_REASONING, ran((1,), (2,)), 1.1),
    Case("wrong rows", WITHOUT_REASONING, ran((1,)), 0.4),
    Case("no such column", WITHOUT_REASONING, Execution("refused", detail="no such column: x"), 0.2),
    Case("no such table", WITHOUT_REASONING, Execution("refused", detail="no such table: x"), 0.2),
    Case("syntax error", WITHOUT_REASONING, Execution("refused", detail='near "SELEC": syntax error'), 0.0),
    Case("stopped", WITHOUT_REASONING, Execution("timeout"), 0.4, 0.0, "timeout_is_empty"),
    Case("a write", WITHOUT_REASONING, FORBIDDEN, 0.4, 0.2, "writes_are_executed"),
]


@pytest.mark.parametrize("case", BIRD_CASES_WITHOUT_REASONING, ids=lambda case: case.name)
def test_text_to_sql_on_bird_without_reasoning(case: Case) -> None:
    check(load_task("text_to_sql", dataset="bird", reasoning=False), SQL_ROW, case)


def test_only_birds_form_without_reasoning_pays_for_sql_that_fails_while_running() -> None:
    failed = Execution("refused", detail="no such column: x")
    spider = load_task("text_to_sql", dataset="spider", reasoning=False)
    assert reward(spider, WITHOUT_REASONING, SQL_ROW, failed) == 0.0
    assert reward(load_task("text_to_sql", dataset="bird"), GOOD_SQL, SQL_ROW, failed) == 0.0


# ------------------------------------------------------------------ the form without reasoning, and leniency


FAMILIES = [
    ("publication_search", {}, ONE, Hits(("d1",), 1), (6.0, -4.0, -3.0)),
    ("trial_search", {}, ONE, Hits(("d1",), 1), (6.0, -4.0, -3.0)),
    ("evidence_seeking", {"dataset": "nq"}, EVIDENCE_ROW, found_at(1, 1), (6.0, -4.0, -3.0)),
    ("evidence_seeking", {"dataset": "triviaqa"}, EVIDENCE_ROW, found_at(1, 1), (6.0, -4.0, -3.0)),
    ("evidence_seeking", {"dataset": "squad"}, EVIDENCE_ROW, found_at(1, 1), (6.0, -4.0, -2.0)),
    ("ranking", {"dataset": "fever"}, ONE, Hits(("d1",), 1), (1.1, -2.0, -2.0)),
    ("text_to_sql", {"dataset": "bird"}, SQL_ROW, ran((1,), (2,)), (1.1, -2.0, -2.0)),
    ("text_to_sql", {"dataset": "spider"}, SQL_ROW, ran((1,), (2,)), (1.1, -2.0, -2.0)),
]
families = pytest.mark.parametrize(
    ("name", "options", "row", "outcome", "prices"), FAMILIES, ids=lambda value: value if isinstance(value, str) else ""
)


@families
def test_the_form_without_reasoning(
    name: str, options: dict[str, Any], row: Row, outcome: Outcome, prices: tuple[float, float, float]
) -> None:
    task, (best, tags, json) = load_task(name, reasoning=False, **options), prices
    good = GOOD_SQL if name == "text_to_sql" else GOOD
    body = good.removeprefix(THINK)
    inside = body.removeprefix("<answer>").removesuffix("</answer>")
    cases = [
        Case("good", body, outcome, best),
        Case("no tags", inside, None, tags),
        Case("two answers", body * 2, None, tags),
        Case("wrong order", f"</answer>{inside}<answer>", None, tags),
        Case("bare query", "<answer>a query</answer>", None, json),
        Case("thoughts all the same", good, outcome, best, tags, "think_tags_ignored"),
    ]
    for case in cases:
        check(task, row, case)


@families
def test_a_prompt_that_ends_with_the_opening_tag(
    name: str, options: dict[str, Any], row: Row, outcome: Outcome, prices: tuple[float, float, float]
) -> None:
    # As in the original: the tag of the prompt counts as the answer's own.
    task, (best, tags, _) = load_task(name, prefill=True, **options), prices
    good = GOOD_SQL if name == "text_to_sql" else GOOD
    check(task, row, Case("goes on", good.removeprefix("<think>"), outcome, best))
    check(task, row, Case("opens it again", good, None, tags))
    check(task, row, Case("never closes it", good.removeprefix(THINK), None, tags))


@families
def test_the_lenient_format_of_every_task_is_the_originals(
    name: str, options: dict[str, Any], row: Row, outcome: Outcome, prices: tuple[float, float, float]
) -> None:
    task, (best, tags, json) = load_task(name, strict=False, **options), prices
    good = GOOD_SQL if name == "text_to_sql" else GOOD
    for case in format_cases(good, outcome, tags, json, best):
        assert reward(task, case.text, row, case.outcome or outcome) == pytest.approx(case.original), case.name


@pytest.mark.parametrize("case", SEARCH_CASES, ids=lambda case: case.name)
def test_lenient_format_is_the_originals(case: Case) -> None:
    task = load_task("publication_search", strict=False)
    expected = case.ours if case.fault == "empty_answer_rewarded" else case.original
    assert reward(task, case.text, SEARCH_ROW, case.outcome) == expected


def test_every_fault_is_documented_and_every_documented_fault_is_tested() -> None:
    section = DOCS.read_text(encoding="utf-8").partition("## Where we differ")[2].partition("\n## ")[0]
    documented = {line.split("`")[1] for line in section.splitlines() if line.startswith("| `")}
    assert documented == set(FAULTS) | ELSEWHERE
    cases = [*SEARCH_CASES, *NQ_CASES, *(case for _, case in RANKING_CASES), *BIRD_CASES]
    assert {case.fault for case in cases if case.fault} | {"think_tags_ignored"} == set(FAULTS)
