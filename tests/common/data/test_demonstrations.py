"""Demonstrations become prompts and answers in the task's own form; what is none is named by its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.data.beir import DataError
from common.data.demonstrations import read_demonstrations
from common.data.worlds.sql import build_world
from common.tasks import ParsedAnswer, Row, Task, load_task

ROW = {"text": "does aspirin prevent stroke", "reasoning": "Both have synonyms.", "query": "aspirin AND stroke"}
PROMPT = [{"role": "system", "content": "Answer."}, {"role": "user", "content": "aspirin?"}]


def written(folder: Path, *rows: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("prefill", [False, True])
@pytest.mark.parametrize("reasoning", [False, True])
def test_an_answer_has_the_form_that_the_task_asks_for(tmp_path: Path, reasoning: bool, prefill: bool) -> None:
    task = load_task("publication_search", reasoning=reasoning, prefill=prefill)
    (found,) = read_demonstrations(written(tmp_path, ROW), task)
    assert found.messages == task.messages(Row("any", ROW["text"]))
    assert task.parse(found.answer) == ParsedAnswer("Both have synonyms." if reasoning else "", "aspirin AND stroke")
    shown = found.messages[0]["content"].replace("your search query", "aspirin AND stroke")
    assert (task.response_prefix + found.answer) in shown.replace("your thoughts\n", "Both have synonyms.\n")


def test_a_prompt_of_ones_own_is_left_as_it_is(tmp_path: Path) -> None:
    rows = {"messages": PROMPT, "reasoning": "why", "query": "aspirin"}
    (found,) = read_demonstrations(written(tmp_path, rows), load_task("ranking"))
    assert found.messages == PROMPT


def test_reference_queries_of_a_prepared_set_are_answers(tmp_path: Path) -> None:
    world = build_world(tmp_path / "world", databases=3, heldout_databases=1, questions=4)
    task = load_task("text_to_sql", reasoning=False)
    path = world / "rows" / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    found = read_demonstrations(path, task)
    assert [task.parse(each.answer).query for each in found] == [row["gold_sql"] for row in rows]
    assert rows[0]["tables"] in found[0].messages[-1]["content"]


def test_an_own_answer_goes_before_the_reference_query(tmp_path: Path) -> None:
    row = {"text": "how many?", "database": "d", "tables": "CREATE TABLE t (a)", "gold_sql": "SELECT 1"}
    task = load_task("text_to_sql", reasoning=False)
    (found,) = read_demonstrations(written(tmp_path, {**row, "sql": "SELECT 2"}), task)
    assert task.parse(found.answer).query == "SELECT 2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": None}, "no text under 'query'"),
        ({"query": ["a"]}, "no text under 'query'"),
        ({"query": "  "}, "empty_query"),
        ({"query": "a\u0000b"}, "control_character"),
        ({"reasoning": ""}, "task.reasoning=false"),
        ({"reasoning": "so <answer> it is"}, "repeated_tag"),
        ({"text": " "}, "no request"),
        ({"txet": "a"}, "txet"),
        ({"relevant": {"d1": 1}}, "Expected `array`"),
        ({"messages": []}, "end with the user's request"),
        ({"messages": [*PROMPT, {"role": "assistant", "content": "aspirin"}]}, "end with the user's request"),
        ({"messages": [{"role": "user"}]}, "content"),
        ({"messages": "aspirin?"}, "role and content"),
    ],
)
def test_a_broken_row_is_named_by_its_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = written(tmp_path, ROW, {**ROW, **change})
    with pytest.raises(DataError, match=r"rows\.jsonl line 2") as caught:
        read_demonstrations(path, load_task("publication_search"))
    assert message in str(caught.value)


def test_a_file_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no row"):
        read_demonstrations(written(tmp_path), load_task("publication_search"))


TASKS = [load_task("ranking", reasoning=reasoning, prefill=prefill) for reasoning in (0, 1) for prefill in (0, 1)]


@given(st.sampled_from(TASKS), st.text('ab<>/"\\{}é\n\t 𝔸', min_size=1), st.text('ab \n{}<"', max_size=20))
def test_what_is_written_is_parsed_back(task: Task, query: str, think: str) -> None:
    """But for white space at the ends, whatever characters there are."""
    parsed = task.parse(task.answer_text(query, think))
    if query.strip():
        assert parsed == ParsedAnswer(think.strip() if task.reasoning else "", query.strip())
    else:
        assert not isinstance(parsed, ParsedAnswer)
