"""Every data set of the original, from its published files to a score: prepare, prompt, parse, search, score."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from common.data.catalogue import DATASETS, Dataset
from common.data.prepare import prepare
from common.data.rows import read_requests
from common.scores import InvalidOutput, Scored
from common.tasks import ParsedAnswer, Row, Task, load_task
from common.tasks.text_to_sql import TextToSql
from rewarders.answerers.sql import SqlAnswerer
from rewarders.scoring import Scorer
from tests.common.data import raw_worlds
from tests.rewarders.search_scorer import search_scorer

REAL = os.environ.get("DEEPRETRIEVAL_DATA")
# Of the folder of real data: the files of each set, and its splits with their rows as counted there.
REAL_FILES = {
    "pubmed": ("deepretrieval_pubmed/val.jsonl", {"test": 101}),
    # One request of train is asked by dev too. Its val was cut from test.
    "ctgov": ("deepretrieval_ctgov/*.jsonl", {"train": 5073, "dev": 1692, "test": 101}),
    "nq": ("openqa/deepretrieval_nq_serini/*", {"dev": 8757, "test": 3610}),
    "triviaqa": ("openqa/deepretrieval_triviaqa/*", {"dev": 8837}),
    "squad": ("openqa/deepretrieval_squad/*", {"test": 10570}),
    "scifact": ("scifact/*", {"train": 727, "dev": 80, "test": 300}),
    "nfcorpus": ("nfcorpus_queries_qrels_only/*", {"train": 2582, "dev": 323, "test": 323}),
    "bird": ("deepretrieval_sql/bird_*.jsonl", {"test": 1534}),
    "spider": ("spider_dev/*", {"dev": 1034}),
}
WITHOUT_DATABASES = {"bird"}


def task_of(dataset: Dataset) -> Task:
    options = {"dataset": dataset.variant} if dataset.variant else {}
    return load_task(dataset.task, **options)


def answer_text(task: Task, query: str) -> str:
    return f"<think>so</think>\n<answer>\n{json.dumps({task.answer_key: query})}\n</answer>"


async def assert_scored(dataset: Dataset, folder: Path, rows: Sequence[Row]) -> None:
    """The right query earns the task's best, a wrong one less, and one that is no answer the penalty."""
    task = task_of(dataset)
    for row in rows:
        task.check_row(row)
        request = task.messages(row)[-1]["content"]
        assert row.text.strip() in request
        assert row.tables.strip() in request
        right = row.gold_sql or " ".join(row.text.split())
        assert task.parse(answer_text(task, right)) == ParsedAnswer("so", right.strip())
    if isinstance(task, TextToSql):
        async with SqlAnswerer(task, folder / "databases", processes=1) as answerer:
            for row in rows:
                await _assert_graded(Scorer(task, answerer), row, "SELECT 'wrong'")
        return
    for row in rows:
        scorer = search_scorer(task, raw_worlds.engine_for(row))
        async with scorer.answerer:
            await _assert_graded(scorer, row, "unheard-of")


async def _assert_graded(scorer: Scorer, row: Row, wrong: str) -> None:
    task = scorer.task
    right = row.gold_sql or " ".join(row.text.split())
    texts = [answer_text(task, right), answer_text(task, wrong), right]
    good, bad, broken = await scorer.score_group(texts, row)
    assert isinstance(good, Scored), good
    assert isinstance(bad, Scored)
    assert isinstance(broken, InvalidOutput)
    assert good.metrics[task.metric] == 1.0
    assert good.reward > bad.reward > broken.reward


# ---------------------------------------------------------------------- files in the documented format


@pytest.mark.parametrize("name", sorted(name for name, each in DATASETS.items() if each.layout in raw_worlds.WRITERS))
async def test_from_published_files_to_a_score(name: str, tmp_path: Path) -> None:
    dataset = DATASETS[name]
    raw_worlds.WRITERS[dataset.layout](dataset, tmp_path / "raw")
    prepared = prepare(dataset, tmp_path / "raw", tmp_path / name)
    assert set(prepared.rows) == {"train", "dev", "test"}
    assert min(prepared.rows.values()) >= 1
    splits = {split: read_requests(tmp_path / name, split) for split in prepared.rows}
    assert {split: len(rows) for split, rows in splits.items()} == prepared.rows
    texts = [row.text for rows in splits.values() for row in rows]
    assert len(set(texts)) == len(texts), "no request is in two splits"
    assert {text.split()[-1] for text in (row.text for row in splits["test"])} <= {"test", "dev", "survival"}
    await assert_scored(dataset, tmp_path / name, splits["test"])
    await assert_scored(dataset, tmp_path / name, splits["dev"][:3])


async def test_both_sql_sets_as_one(tmp_path: Path) -> None:
    for name in ("bird", "spider"):
        raw_worlds.write_sql(DATASETS[name], tmp_path / "raw" / name)
        prepare(DATASETS[name], tmp_path / "raw" / name, tmp_path / name)
    prepared = prepare(DATASETS["sql_all"], tmp_path / "raw", tmp_path / "sql_all")
    rows = read_requests(tmp_path / "sql_all", "test")
    assert prepared.rows["test"] == len(rows) == 6
    assert {row.database for row in rows} == {"bird_shop", "spider_lab"}
    await assert_scored(DATASETS["sql_all"], tmp_path / "sql_all", rows)


def test_passages_become_a_corpus_that_other_sets_share(tmp_path: Path) -> None:
    raw_worlds.write_passages(tmp_path / "raw" / "wikipedia")
    prepare(DATASETS["wikipedia"], tmp_path / "raw" / "wikipedia", tmp_path / "wikipedia")
    raw_worlds.write_questions(DATASETS["nq"], tmp_path / "raw" / "nq")
    prepared = prepare(DATASETS["nq"], tmp_path / "raw" / "nq", tmp_path / "nq")
    assert prepared.notes == ()
    documents = [json.loads(line) for line in (tmp_path / "nq" / "corpus.jsonl").read_text().splitlines()]
    assert documents[0] == {"_id": "1", "title": "Aaron", "text": 'Aaron "the" prophet'}
    assert [document["_id"] for document in documents] == ["1", "2"]


def test_every_set_is_tested_here() -> None:
    tested = {name for name, each in DATASETS.items() if each.layout in raw_worlds.WRITERS} | {"sql_all", "wikipedia"}
    assert tested == set(DATASETS)


# ---------------------------------------------------------------------- real rows


@pytest.mark.skipif(REAL is None, reason="DEEPRETRIEVAL_DATA is not set")
@pytest.mark.parametrize("name", sorted(REAL_FILES))
async def test_real_rows_to_a_score(name: str, tmp_path: Path) -> None:
    pattern, expected = REAL_FILES[name]
    dataset = DATASETS[name]
    raw = tmp_path / "raw"
    raw.mkdir()
    for path in Path(REAL or "").glob(pattern):
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, raw / path.name)
    prepared = prepare(dataset, raw, tmp_path / name)
    assert prepared.rows == expected
    split = "test" if "test" in expected else "dev"
    rows = [row for row in read_requests(tmp_path / name, split) if row.database not in {"wta_1", "flight_2"}]
    if name in WITHOUT_DATABASES:
        assert [note for note in prepared.notes if "databases are missing" in note]
        assert all(row.gold_sql and row.database for row in rows)
        return
    # Every seventh, so that several databases are among them.
    await assert_scored(dataset, tmp_path / name, rows[::7][:12])
