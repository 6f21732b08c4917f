"""The generated worlds: repeatable, whole, and such that the obvious answers are not the right ones."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from common.data.beir import read_corpus
from common.data.rows import read_requests
from common.data.worlds import WORLDS, evidence, publications, ranking, sql, trials
from common.data.worlds.folders import whole_folder
from common.metrics.answers import first_with_answer
from common.tasks import Row, load_task
from rewarders.servers.ctgov.records import read_records

Build = Callable[..., Path]
SMALL: dict[str, tuple[Build, dict[str, Any]]] = {
    "publications": (
        publications.build_world,
        {"documents": 120, "train_requests": 20, "test_requests": 10},
    ),
    "sql": (sql.build_world, {"databases": 3, "heldout_databases": 2, "questions": 8}),
    "evidence": (
        evidence.build_world,
        {"people": 40, "train_questions": 20, "test_questions": 10, "circles": 5, "passages_per_circle": 12},
    ),
    "ranking": (ranking.build_world, {"documents": 120, "train_requests": 20, "test_requests": 10}),
    "trials": (trials.build_world, {"trials": 120, "train_requests": 20, "test_requests": 10}),
}
FAMILIES = {
    "publications": "publication_search",
    "sql": "text_to_sql",
    "evidence": "evidence_seeking",
    "ranking": "ranking",
    "trials": "trial_search",
}


def build(name: str, folder: Path, seed: int = 0) -> Path:
    function, sizes = SMALL[name]
    return function(folder, seed, **sizes)


def contents(folder: Path) -> dict[str, bytes | str]:
    """Bytes of every file; of databases what is in them, for SQLite writes its own version into the file."""
    found: dict[str, bytes | str] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".sqlite":
            with closing(sqlite3.connect(path)) as connection:
                found[name] = "\n".join(connection.iterdump())
        else:
            found[name] = path.read_bytes()
    return found


def test_every_world_is_known_and_tested() -> None:
    assert {world.module for world in WORLDS.values()} == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_a_seed_gives_one_world(name: str, tmp_path: Path) -> None:
    first = contents(build(name, tmp_path / "a", 3))
    assert contents(build(name, tmp_path / "b", 3)) == first
    assert contents(build(name, tmp_path / "c", 4)) != first
    assert contents(build(name, tmp_path / "c", 3)) == first, "what was there is replaced"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"], "nothing unfinished is left"


@pytest.mark.parametrize("name", SMALL)
def test_rows_are_what_their_task_needs(name: str, tmp_path: Path) -> None:
    folder, task = build(name, tmp_path / "world"), load_task(FAMILIES[name])
    splits = [read_requests(folder, split) for split in ("train", "test")]
    for rows in splits:
        assert len(rows) >= 10
        for row in rows:
            task.check_row(row)
    ids, texts = ([getattr(row, field) for rows in splits for row in rows] for field in ("id", "text"))
    assert len(set(ids)) == len(ids)
    if name != "sql":  # two databases may have a table of the same name
        assert len(set(texts)) == len(texts)


def test_a_folder_that_was_not_finished_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "world").mkdir()
    (tmp_path / "world" / "old").touch()

    def fail() -> None:
        with whole_folder(tmp_path / "world") as folder:
            (folder / "new").touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [path.name for path in tmp_path.rglob("*")] == ["world", "old"]


# ---------------------------------------------------------------------- SQL


def result(folder: Path, row: Row, query: str) -> Counter[tuple[object, ...]]:
    with closing(sqlite3.connect(folder / "databases" / f"{row.database}.sqlite")) as connection:
        return Counter(connection.execute(query).fetchall())


def test_every_reference_query_finds_something_in_its_own_database(tmp_path: Path) -> None:
    folder = build("sql", tmp_path / "world")
    databases = []
    for split in ("train", "test"):
        rows = read_requests(folder, split)
        databases.append({row.database for row in rows})
        for row in rows:
            found = result(folder, row, row.gold_sql)
            assert found, row
            assert found.total() > 1 or list(found) != [(0,)], row
    assert not databases[0] & databases[1], "held-out questions are about databases never trained on"


def test_the_schema_in_the_prompt_is_the_database(tmp_path: Path) -> None:
    folder = build("sql", tmp_path / "world")
    row = read_requests(folder, "train")[0]
    with closing(sqlite3.connect(folder / "databases" / f"{row.database}.sqlite")) as connection:
        statements = [statement for (statement,) in connection.execute("SELECT sql FROM sqlite_master")]
    assert row.tables.split("\n") == statements


# ---------------------------------------------------------------------- evidence


def test_an_answer_stands_in_one_passage_which_names_its_person(tmp_path: Path) -> None:
    folder = build("evidence", tmp_path / "world")
    passages = [document.text for document in read_corpus(folder)]
    for row in read_requests(folder, "train") + read_requests(folder, "test"):
        holders = [passage for passage in passages if first_with_answer([passage], row.answers, "string")]
        assert len(holders) == 1, row
        first, last = holders[0].split()[:2]
        assert f"{first} {last}" in row.text


def test_questions_share_more_words_with_other_passages(tmp_path: Path) -> None:
    folder = build("evidence", tmp_path / "world")
    passages = [document.text for document in read_corpus(folder)]
    rows = read_requests(folder, "train")

    def shared(row: Row, passage: str) -> int:
        return len(set(row.text.split()) & set(passage.split()))

    def answering(row: Row) -> str:
        return next(passage for passage in passages if first_with_answer([passage], row.answers, "string"))

    misled = sum(max(shared(row, p) for p in passages) > shared(row, answering(row)) for row in rows)
    assert misled > len(rows) / 2


def test_more_questions_than_facts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one per question is needed"):
        evidence.build_world(tmp_path / "world", people=4, train_questions=20, test_questions=2)


# ---------------------------------------------------------------------- ranking, trials


def test_grades_tell_the_best_documents_from_related_ones(tmp_path: Path) -> None:
    folder = build("ranking", tmp_path / "world")
    documents = {document.id: f"{document.title} {document.text}" for document in read_corpus(folder)}
    rows = read_requests(folder, "train")
    assert {grade for row in rows for grade in row.grades or (1.0,)} == {1.0, 2.0}
    for row in rows:
        best = [document for document, grade in row.judgments.items() if grade == 2.0]
        assert 2 <= len(best) < len(documents) / 4
        assert set(row.relevant) <= set(documents)


def test_trials_are_records_that_the_server_reads(tmp_path: Path) -> None:
    folder = build("trials", tmp_path / "world")
    records = read_records(folder)
    ids = {record["protocolSection"]["identificationModule"]["nctId"] for record in records}
    assert len(ids) == 120
    for row in read_requests(folder, "train") + read_requests(folder, "test"):
        assert row.relevant
        assert set(row.relevant) <= ids


def test_a_trial_says_in_its_fields_what_its_summary_says(tmp_path: Path) -> None:
    for record in read_records(build("trials", tmp_path / "world")):
        protocol = record["protocolSection"]
        summary = protocol["descriptionModule"]["briefSummary"]
        (condition,) = protocol["conditionsModule"]["conditions"]
        (intervention,) = protocol["armsInterventionsModule"]["interventions"]
        assert f"The role of {intervention['name']}" in summary
        assert f"in {condition} is uncertain" in summary
