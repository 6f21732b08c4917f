"""What all tasks have in common: prompts, rows, what a task says it needs."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from common.sql.table import Table
from common.tasks import Execution, Hits, ParsedAnswer, Row, load_task, task_names
from common.tasks.row import from_reference, to_reference

FULL_ROW = Row(
    text="who sings does he love me with reba",
    id="q7",
    relevant=("d1", "d2"),
    grades=(2, 1),
    answers=("Linda Davis",),
    max_date="2020/01/31",
    database="concerts",
    tables="CREATE TABLE singer (name TEXT, age INT)",
    knowledge="a duet has two singers",
    gold_sql="SELECT name FROM singer",
    metadata={"source": "nq"},
)
ANSWER = ParsedAnswer("", "x")
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("publication_search", {}),
    ("trial_search", {}),
    *(("evidence_seeking", {"retriever": retriever}) for retriever in ("bm25", "bm25_boolean", "dense")),
    *(("ranking", {"dataset": name}) for name in ("scifact", "nfcorpus", "fever", "hotpotqa", "fiqa", "other")),
    *(("ranking", {"dataset": name, "retriever": "dense"}) for name in ("msmarco_beir", "msmarco_health")),
    ("text_to_sql", {"dataset": "bird"}),
    ("text_to_sql", {"dataset": "spider"}),
]


def test_the_families_are_all_there() -> None:
    assert task_names() == ["evidence_seeking", "publication_search", "ranking", "text_to_sql", "trial_search"]
    for name in task_names():
        assert load_task(name).name == name


@pytest.mark.parametrize(("name", "options"), VARIANTS)
@pytest.mark.parametrize("reasoning", [True, False])
def test_the_full_prompt_shows_the_form_it_parses(name: str, options: dict[str, Any], reasoning: bool) -> None:
    task = load_task(name, reasoning=reasoning, **options)
    system, user = task.messages(FULL_ROW)
    assert (system["role"], user["role"]) == ("system", "user")
    assert FULL_ROW.text in user["content"]
    assert "Linda" not in user["content"] + system["content"]
    assert ("<think>" in system["content"]) is reasoning
    shown = system["content"][system["content"].rindex("<think>" if reasoning else "<answer>\n{") :]
    assert task.parse(shown) == ParsedAnswer("your thoughts" if reasoning else "", task.example)
    rest = task.parse(shown.removeprefix("<think>").removeprefix("<answer>"))
    assert not isinstance(rest, ParsedAnswer)
    prefilled = load_task(name, reasoning=reasoning, prefill=True, **options)
    assert isinstance(prefilled.parse(shown.removeprefix(prefilled.response_prefix)), ParsedAnswer)


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_the_short_prompt_has_no_instructions(name: str, options: dict[str, Any]) -> None:
    messages = load_task(name, prompt="short", **options).messages(FULL_ROW)
    assert [message["role"] for message in messages] == ["user"]
    assert FULL_ROW.text in messages[0]["content"]
    assert "<answer>" not in messages[0]["content"]
    if name != "text_to_sql":
        assert messages[0]["content"] == FULL_ROW.text


def test_the_sql_prompt_has_schema_and_knowledge_but_not_the_solution() -> None:
    for prompt in ("full", "short"):
        text = load_task("text_to_sql", prompt=prompt).messages(FULL_ROW)[-1]["content"]
        assert text.index(FULL_ROW.tables) < text.index(FULL_ROW.knowledge) < text.index(FULL_ROW.text)
        assert FULL_ROW.gold_sql not in text
    plain = msgspec.structs.replace(FULL_ROW, knowledge="")
    assert "Knowledge" not in load_task("text_to_sql").messages(plain)[-1]["content"]


def test_an_own_role_replaces_ours() -> None:
    system, _ = load_task("ranking", role="You know all about ships.").messages(FULL_ROW)
    assert system["content"].startswith("You know all about ships.\n\n")
    assert '{"query": "your search query"}' in system["content"]


def test_the_prompt_says_what_the_engine_understands() -> None:
    prompts = {
        retriever: load_task("ranking", retriever=retriever).messages(FULL_ROW)[0]["content"]
        for retriever in ("bm25", "bm25_boolean", "dense")
    }
    assert "AND, OR and NOT" in prompts["bm25_boolean"]
    assert "operators and parentheses mean nothing" in prompts["bm25"].replace("\n", " ")
    assert "meaning" in prompts["dense"]


def test_engines_follow_the_retriever() -> None:
    assert load_task("ranking").engines == load_task("evidence_seeking").engines == {"bm25"}
    assert load_task("ranking", retriever="dense").engines == {"dense"}
    assert load_task("publication_search").engines == {"pubmed"}
    assert load_task("trial_search").engines == {"ctgov"}
    assert load_task("text_to_sql").engines == {"sqlite"}


def test_dates_bound_publications_and_trials_on_request() -> None:
    assert load_task("publication_search").dated
    assert not load_task("trial_search").dated
    assert load_task("trial_search", dated=True).dated
    assert not load_task("ranking").dated


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ranking", {"dataset": "scifcat"}, "scifact"),
        ("ranking", {"retriever": "sparse"}, "bm25"),
        ("evidence_seeking", {"dataset": "trivia"}, "triviaqa"),
        ("evidence_seeking", {"rule": "exact"}, "regex"),
        ("text_to_sql", {"dataset": "wikisql"}, "spider"),
        ("text_to_sql", {"comparator": "exact"}, "strict"),
        ("trial_search", {"dataset": "x"}, "dataset"),
        ("ranking", {"top_k": 0}, "top_k"),
    ],
)
def test_wrong_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_task(name, **options)


# ------------------------------------------------------------------ rows


def test_a_row_travels_with_a_ticket_without_its_schema() -> None:
    reference = msgspec.msgpack.decode(msgspec.msgpack.encode(to_reference(FULL_ROW)))
    assert from_reference(reference) == msgspec.structs.replace(FULL_ROW, tables="")
    assert FULL_ROW.tables not in str(reference)


def test_a_reference_without_grades_still_reads() -> None:
    row = from_reference({"id": "q1", "text": "a", "relevant": ["1"], "max_date": None})
    assert row == Row("q1", "a", relevant=("1",))


@pytest.mark.parametrize(
    "reference",
    [
        {"sql": "SELECT 1"},
        {"relevant": ["1"]},
        {"id": "q1", "text": 7},
        {"id": "q1", "text": "a", "grades": [1]},
        {"id": "q1", "text": "a", "colour": 1},
    ]
    + [
        {"id": "q1", "text": "a", "relevant": ["1"], "grades": [grade]} for grade in (0, -1, float("nan"), float("inf"))
    ],
)
def test_what_is_no_row_is_refused(reference: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not a task's row"):
        from_reference(reference)


def test_a_row_that_lacks_what_the_task_needs() -> None:
    bare = Row("q9", "a request")
    for name, field in [
        ("publication_search", "relevant"),
        ("trial_search", "relevant"),
        ("ranking", "relevant"),
        ("evidence_seeking", "answers"),
        ("text_to_sql", "gold_sql"),
    ]:
        load_task(name).check_row(FULL_ROW)
        with pytest.raises(ValueError, match=rf"'q9' has no {field}"):
            load_task(name).check_row(bare)


# ------------------------------------------------------------------ outcomes


def test_an_outcome_of_another_engine_is_refused() -> None:
    table = Table(("n",), ((1,),))
    executed = Execution("ok", table, table)
    for name in ("publication_search", "trial_search", "ranking", "evidence_seeking"):
        with pytest.raises(ValueError, match="scores rankings"):
            load_task(name).score(FULL_ROW, ANSWER, executed)
    with pytest.raises(ValueError, match="sqlite"):
        load_task("text_to_sql").score(FULL_ROW, ANSWER, Hits((), 0))
    with pytest.raises(ValueError, match="texts of the hits"):
        load_task("evidence_seeking").score(FULL_ROW, ANSWER, Hits(("1",), 1))
    with pytest.raises(ValueError, match="comes with its table"):
        Execution("ok", table)


def test_evidence_reads_no_passage_after_the_first_with_an_answer() -> None:
    class Passages(list[str]):
        read = 0

        def __iter__(self):  # type: ignore[no-untyped-def]
            for text in list.__iter__(self):
                Passages.read += 1
                yield text

    hits = Hits(("1", "2", "3"), 3, texts=Passages(["no", "Linda Davis", "no"]))
    metrics = load_task("evidence_seeking").score(FULL_ROW, ANSWER, hits).metrics
    assert Passages.read == 2
    assert (metrics["rank"], metrics["mrr"]) == (2.0, 0.5)
    assert (metrics["hits@1"], metrics["hits@5"], metrics["hits@20"]) == (0.0, 1.0, 1.0)
    assert metrics["tier"] == 5.0


def test_passages_beyond_top_k_do_not_count() -> None:
    hits = Hits(("1", "2", "3"), 3, texts=["no", "no", "Linda Davis"])
    for top_k, mrr in ((2, 0.0), (3, 1 / 3)):
        metrics = load_task("evidence_seeking", top_k=top_k).score(FULL_ROW, ANSWER, hits).metrics
        assert metrics["mrr"] == mrr


def test_a_rank_that_does_not_exist_is_no_number() -> None:
    metrics = load_task("evidence_seeking").score(FULL_ROW, ANSWER, Hits((), 0, texts=())).metrics
    assert "rank" not in metrics
    assert (metrics["mrr"], metrics["tier"]) == (0.0, 0.0)


def test_patterns_as_answers() -> None:
    row = Row("q1", "when?", answers=(r"19\d\d",))
    hits = Hits(("1",), 1, texts=["in 1961"])
    assert load_task("evidence_seeking").score(row, ANSWER, hits).metrics["mrr"] == 0.0
    assert load_task("evidence_seeking", rule="regex").score(row, ANSWER, hits).metrics["mrr"] == 1.0


def test_the_sql_comparator_can_be_chosen() -> None:
    twice = Execution("ok", Table(("n",), ((1,), (1,))), Table(("n",), ((1,),)))
    accuracies = {
        name: load_task("text_to_sql", comparator=name).score(FULL_ROW, ANSWER, twice).metrics["accuracy"]
        for name in ("bird", "spider", "strict")
    }
    assert accuracies == {"bird": 1.0, "spider": 0.0, "strict": 0.0}
    assert "DISTINCT" in load_task("text_to_sql", comparator="bird").executable("SELECT DISTINCT a FROM b")
    assert "DISTINCT" not in load_task("text_to_sql", comparator="spider").executable("SELECT DISTINCT a FROM b")


def test_sql_metrics_tell_the_ways_to_fail_apart() -> None:
    task = load_task("text_to_sql")
    one = Table(("n",), ((1,),))
    outcomes = {
        "equal": Execution("ok", one, one),
        "wrong": Execution("ok", Table(("n",), ()), one),
        "column": Execution("refused", detail="no such column: x"),
        "syntax": Execution("refused", detail='near "x": syntax error'),
        "timeout": Execution("timeout"),
    }
    seen = {name: task.score(FULL_ROW, ANSWER, outcome).metrics for name, outcome in outcomes.items()}
    assert {name: metrics["execution"] for name, metrics in seen.items()} == {
        "equal": 1.0,
        "wrong": 0.5,
        "column": 0.25,
        "syntax": 0.0,
        "timeout": 0.0,
    }
    assert [metrics["executed"] for metrics in seen.values()] == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert [metrics["timeout"] for metrics in seen.values()] == [0.0, 0.0, 0.0, 0.0, 1.0]


def test_malformed_and_refused_scores_carry_their_component() -> None:
    task = load_task("publication_search")
    tags, json = task.parse("nothing"), task.parse("<think></think><answer>nothing</answer>")
    assert not isinstance(tags, ParsedAnswer)
    assert not isinstance(json, ParsedAnswer)
    assert (task.malformed_score(tags).reward, task.malformed_score(json).reward) == (-4.0, -3.0)
    assert task.malformed_score(tags).metrics == {"format": 0.0}
    assert task.refused_score().metrics == {"format": 1.0, "refused": 1.0}
