from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.data.beir import DataError
from common.data.rows import read_requests
from common.tasks import Row


def write(folder: Path, *lines: str) -> Path:
    (folder / "rows").mkdir()
    (folder / "rows" / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_rows_of_any_task(tmp_path: Path) -> None:
    evidence = {"id": "nq-1", "text": "who sings", "answers": ["Linda Davis"]}
    sql = {"id": "s-1", "text": "how many", "database": "shop", "tables": "CREATE TABLE t (n)", "gold_sql": "SELECT 1"}
    folder = write(tmp_path, json.dumps(evidence), "", json.dumps(sql))
    assert read_requests(folder, "train") == [
        Row("nq-1", "who sings", answers=("Linda Davis",)),
        Row("s-1", "how many", database="shop", tables="CREATE TABLE t (n)", gold_sql="SELECT 1"),
    ]


def test_without_rows_the_judgments_are_read(tmp_path: Path) -> None:
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\n")
    (tmp_path / "queries.jsonl").write_text('{"_id": "q1", "text": "a request"}\n')
    assert read_requests(tmp_path, "train") == [Row("q1", "a request", ("d1",))]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2"),
        ("[]", "line 2"),
        ('{"id": "b"}', "text"),
        ('{"id": "b", "text": "x", "anwsers": []}', "anwsers"),
        ('{"id": "b", "text": "x", "relevant": ["1"], "grades": [0]}', "above zero"),
        ('{"id": "a", "text": "x"}', "twice"),
    ],
)
def test_a_line_that_is_no_row(tmp_path: Path, line: str, message: str) -> None:
    folder = write(tmp_path, '{"id": "a", "text": "x"}', line)
    with pytest.raises(DataError, match=message):
        read_requests(folder, "train")
