"""SQL answers from the generated text to the score, on a real database in the jail."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from common.scores import InvalidOutput, Scored, Unavailable
from common.sql.table import Table
from common.tasks import Execution, Row
from common.tasks.text_to_sql import TextToSql
from rewarders.answerers.base import UnusableRowError
from rewarders.answerers.sql import SqlAnswerer, database_path
from rewarders.engines.base import EngineUnavailable
from rewarders.scoring import INLINE_CELLS, Scorer, cells_of
from tests.rewarders.sql.conftest import make_database

FOREVER = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT count(*) FROM n"
ROW = Row("s1", "Who is older than 30?", database="people", gold_sql="SELECT name FROM people WHERE age > 30")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    databases = tmp_path / "databases"
    (databases / "nested").mkdir(parents=True)
    make_database(databases / "people.sqlite")
    make_database(databases / "nested" / "nested.sqlite")
    make_database(tmp_path / "secret.sqlite")
    return databases


@pytest.fixture
async def scorer(folder: Path) -> AsyncIterator[Scorer]:
    task = TextToSql(prompt="short", reasoning=False, dataset="bird")
    async with SqlAnswerer(task, folder, processes=1, deadline_s=3.0) as answerer:
        yield Scorer(task, answerer)


def text(sql: str) -> str:
    return f'<answer>{{"sql": "{sql}"}}</answer>'


async def scored(scorer: Scorer, sql: str, row: Row = ROW) -> Scored:
    score = await scorer.score_text(text(sql), row)
    assert isinstance(score, Scored)
    return score


async def test_each_way_a_query_can_go_has_its_reward(scorer: Scorer) -> None:
    equal = await scored(scorer, "SELECT name FROM people WHERE age >= 31")
    assert (equal.reward, equal.metrics["accuracy"], equal.results) == (1.1, 1.0, 2)
    wrong = await scored(scorer, "SELECT name FROM people")
    assert (wrong.reward, wrong.metrics["accuracy"], wrong.metrics["executed"]) == (pytest.approx(0.4), 0.0, 1.0)
    failed = await scored(scorer, "SELECT height FROM people")
    assert failed.reward == pytest.approx(0.2)
    assert (failed.metrics["executed"], failed.metrics["timeout"]) == (0.0, 0.0)
    assert (await scored(scorer, "SELEC name FROM people")).reward == 0.0
    assert (await scored(scorer, "DELETE FROM people")).reward == pytest.approx(0.2)
    assert isinstance(await scorer.score_text("no answer", ROW), InvalidOutput)


async def test_a_slow_query_is_a_timeout_and_no_empty_table(scorer: Scorer) -> None:
    """Its reference query finds nothing, which an empty table would equal."""
    row = Row("s2", "?", database="people", gold_sql="SELECT name FROM people WHERE age > 1000")
    slow = await scored(scorer, FOREVER, row)
    assert (slow.reward, slow.metrics["timeout"]) == (0.0, 1.0)
    assert (await scored(scorer, "SELECT name FROM people WHERE 1 = 0", row)).metrics["accuracy"] == 1.0


async def test_a_reference_query_that_fails_blames_no_answer(scorer: Scorer) -> None:
    assert isinstance(scorer.answerer, SqlAnswerer)
    row = Row("s3", "?", database="people", gold_sql="SELECT nothing FROM nowhere")
    with pytest.raises(UnusableRowError, match="row 's3': the gold query is refused"):
        await scorer.answerer.gold(row)
    missing = Row("s4", "?", database="unknown", gold_sql="SELECT 1")
    score = await scorer.score_text(text("SELECT 1"), missing)
    assert isinstance(score, Unavailable)
    assert "no database 'unknown'" in score.reason


async def test_a_slow_reference_query_takes_no_time_from_the_answer(folder: Path) -> None:
    """BIRD's evaluator stops both together after 30 s, and the answer is wrong."""
    task = TextToSql(prompt="short", reasoning=False)
    row = Row("s7", "?", database="people", gold_sql=FOREVER)
    async with SqlAnswerer(task, folder, processes=1, deadline_s=0.5) as answerer:
        score = await Scorer(task, answerer).score_text(text("SELECT 1"), row)
    assert isinstance(score, Unavailable)
    assert "gold query was too slow" in score.reason or "stalled" in score.reason


async def test_equal_queries_run_their_reference_once(scorer: Scorer) -> None:
    await scorer.score_group([text(f"SELECT {n}") for n in range(6)], ROW)
    counters = scorer.answerer.counters()
    assert counters["sql_golds"] == 1
    assert counters["sql_answered"] == 7


@pytest.mark.parametrize("name", ["", ".", "..", "../secret", "/etc/passwd", "a/b", "a\\b", "x\0y"])
def test_a_name_from_data_does_not_leave_the_folder(folder: Path, name: str) -> None:
    with pytest.raises(EngineUnavailable, match="no name of a database"):
        database_path(folder, name)


async def test_a_link_out_of_the_folder_is_not_followed(folder: Path, scorer: Scorer) -> None:
    (folder / "linked.sqlite").symlink_to(folder.parent / "secret.sqlite")
    row = Row("s5", "?", database="linked", gold_sql="SELECT 1")
    score = await scorer.score_text(text("SELECT 1"), row)
    assert isinstance(score, Unavailable)
    assert "outside the folders" in score.reason


def test_both_layouts_of_database_folders_are_found(folder: Path) -> None:
    assert database_path(folder, "people") == folder / "people.sqlite"
    assert database_path(folder, "nested") == folder / "nested" / "nested.sqlite"


async def test_a_long_comparison_holds_nobody_up(folder: Path) -> None:
    """It runs in another thread than the loop's."""
    threads: list[int] = []

    class Watched(TextToSql):
        def measure(self, *arguments: object) -> dict[str, float]:
            threads.append(threading.get_ident())
            return super().measure(*arguments)  # type: ignore[arg-type]

    with sqlite3.connect(folder / "people.sqlite") as connection:
        connection.executemany("INSERT INTO numbers VALUES (?)", [(n,) for n in range(INLINE_CELLS)])
    connection.close()
    row = Row("s6", "?", database="people", gold_sql="SELECT n FROM numbers")
    task = Watched(prompt="short", reasoning=False)
    async with SqlAnswerer(task, folder, processes=1, deadline_s=20.0) as answerer:
        scorer = Scorer(task, answerer)
        assert (await scored(scorer, "SELECT n FROM numbers", row)).metrics["accuracy"] == 1.0
        assert (await scored(scorer, "SELECT name FROM people WHERE age >= 31")).metrics["accuracy"] == 1.0
    assert threads[0] != threading.get_ident() == threads[1]


def test_cells_are_those_of_the_larger_table() -> None:
    small, large = Table(("a",), ((1,),)), Table(("a", "b"), ((1, 2), (3, 4)))
    assert cells_of(Execution("ok", small, large)) == cells_of(Execution("ok", large, small)) == 4
    assert cells_of(Execution("refused")) == 0
