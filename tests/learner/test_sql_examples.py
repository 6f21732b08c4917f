"""The warm start for SQL teaches the shapes of queries and names of the prompt, never which ones are right."""

from __future__ import annotations

import random
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from common.data.rows import read_requests
from common.data.worlds.sql import build_world
from common.tasks import ParsedAnswer, Row, load_task
from learner.warm_start import sql_examples
from learner.warm_start.build import WarmStartSettings, warm_start
from learner.warm_start.families import Family
from learner.warm_start.sql_examples import Shape, common_shapes, imperfect_sql, schema_of, shape_of

TABLES = "CREATE TABLE dog (color, age)\nCREATE TABLE house (city, size)"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_world(tmp_path_factory.mktemp("sql") / "world", databases=6, heldout_databases=1, questions=10)


def row(text: str, sql: str, tables: str = TABLES) -> Row:
    return Row("r", text, database="d", tables=tables, gold_sql=sql)


@pytest.mark.parametrize(
    ("tables", "schema"),
    [
        (TABLES, {"dog": ["color", "age"], "house": ["city", "size"]}),
        ("create table `t` (id INTEGER PRIMARY KEY, name TEXT, FOREIGN KEY (id) REFERENCES u);", {"t": ["id", "name"]}),
        ("", {}),
    ],
)
def test_the_schema_is_read_off_the_statements(tables: str, schema: dict[str, list[str]]) -> None:
    assert schema_of(tables) == schema


def test_a_shape_is_a_query_without_names_and_values() -> None:
    found = shape_of(row("?", "SELECT color FROM dog WHERE age > 3 AND color = 'red'"))
    assert found == Shape(
        ("SELECT ", " FROM ", " WHERE ", " > 3 AND ", " = '", "'"), ("column", "table", "column", "column", "value")
    )
    assert shape_of(row("?", "SELECT max(city) FROM house WHERE size > 3 AND city = 'oslo'")) != found
    assert shape_of(row("?", "SELECT city FROM house WHERE size > 3 AND city = 'oslo'")) == found


def test_an_example_is_right_by_chance_only(world: Path) -> None:
    """Every shape is drawn for every question, as often as it occurs."""
    rows = read_requests(world, "train")
    shapes = common_shapes(rows)
    assert len(shapes) == 4
    assert sum(shapes.values()) == len(rows)
    rng = random.Random(0)
    right = Counter(
        imperfect_sql(one, shape, rng) == one.gold_sql for one in rows for shape in shapes for _ in range(20)
    )
    assert 0.02 < right[True] / right.total() < 0.4


def test_names_come_from_what_the_question_mentions() -> None:
    shape = Shape(("SELECT ", " FROM ", ""), ("column", "table"))
    asked = row("Which city has every house?", "")
    assert {imperfect_sql(asked, shape, random.Random(seed)) for seed in range(9)} == {"SELECT city FROM house"}
    vague = {imperfect_sql(row("Which?", ""), shape, random.Random(seed)) for seed in range(60)}
    assert vague == {
        f"SELECT {column} FROM {table}" for table, columns in schema_of(TABLES).items() for column in columns
    }


@pytest.mark.parametrize("reasoning", [False, True])
def test_every_example_parses_is_clean_and_runs(world: Path, reasoning: bool) -> None:
    task = load_task("text_to_sql", prompt="short", reasoning=reasoning)
    family = Family(world, "sql", task)
    tokenizer = family.tokenizer(600)
    sampler = family.sampler(tokenizer, reasoning)
    requests = {task.request(one): one for one in read_requests(world, "train")}
    sources = {tuple(source.prompt): source for source in sampler.sources}
    rng = random.Random(0)
    for _ in range(100):
        example = sampler.draw(rng)
        text = tokenizer.decode(example.response, skip_special_tokens=True)
        source = sources[tuple(example.prompt)]
        assert sampler.is_clean(text, source), text
        assert not sampler.is_clean(text.replace("FROM", "FROM stranger"), source)
        assert not sampler.is_clean(text.replace("</answer>", ""), source)
        answer = task.parse(text)
        assert isinstance(answer, ParsedAnswer), text
        database = world / "databases" / f"{requests[source.text].database}.sqlite"
        with closing(sqlite3.connect(database)) as connection:
            connection.execute(answer.query)


def test_a_prompt_that_is_too_long_is_passed_over(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = Family(world, "sql", load_task("text_to_sql", prompt="short", reasoning=False))
    tokenizer = family.tokenizer(600)
    monkeypatch.setattr(sql_examples, "LONGEST_PROMPT", 10)
    with pytest.raises(ValueError, match=r"name a model in model\.path"):
        family.sampler(tokenizer, False)


def test_a_model_for_sql_is_built_from_rows_alone(world: Path, tmp_path: Path) -> None:
    settings = WarmStartSettings(width=32, heads=2, vocabulary=600, steps=2, task="text_to_sql", answers="sql")
    folder = warm_start(world, tmp_path, settings)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer('{"sql": "').input_ids) == len(tokenizer(" FROM ").input_ids) == 1
    assert warm_start(world, tmp_path, settings) == folder
    assert warm_start(world, tmp_path, WarmStartSettings(width=32, heads=2, vocabulary=600, steps=2)) != folder
