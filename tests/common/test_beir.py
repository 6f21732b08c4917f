"""The BEIR reader: what it reads, and the one line it answers broken input with."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.data.beir import DataError, read_corpus, read_qrels, read_queries, read_split, splits

DOCUMENT = {"_id": "d1", "title": "A title", "text": "A text.", "metadata": {"pub_date": "2001/02/03"}}


def write_folder(
    folder: Path,
    corpus: list[str] | None = None,
    queries: list[str] | None = None,
    qrels: str = "query-id\tcorpus-id\tscore\nq1\td1\t1\n",
) -> Path:
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    lines = corpus if corpus is not None else [json.dumps(DOCUMENT)]
    (folder / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    lines = queries if queries is not None else [json.dumps({"_id": "q1", "text": "a request"})]
    (folder / "queries.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "qrels" / "train.tsv").write_text(qrels)
    return folder


def test_reads_documents_in_file_order_with_metadata(tmp_path: Path) -> None:
    second = {"_id": 7, "text": "No title, a number for an id."}
    folder = write_folder(tmp_path, corpus=[json.dumps(DOCUMENT), "", json.dumps(second)])
    first, other = read_corpus(folder)
    assert (first.id, first.title, first.text) == ("d1", "A title", "A text.")
    assert first.metadata == {"pub_date": "2001/02/03"}
    assert (other.id, other.title, other.metadata) == ("7", "", {})


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"_id": "d2", ', r"corpus\.jsonl line 2: not JSON \(.+\): fix or remove the line"),
        ("[1, 2]", r"corpus\.jsonl line 2: not a JSON object"),
        ('{"_id": "d2"}', r"corpus\.jsonl line 2: no 'text'"),
        ('{"text": "x"}', r"corpus\.jsonl line 2: no '_id'"),
        ('{"_id": "d2", "text": 5}', r"corpus\.jsonl line 2: 'text' is not a string"),
        ('{"_id": "d2", "text": "x", "metadata": []}', r"corpus\.jsonl line 2: 'metadata' is not an object"),
        ('{"_id": "d1", "text": "x"}', r"corpus\.jsonl line 2: the id 'd1' occurs twice"),
    ],
)
def test_a_broken_document_line_is_one_clear_line(tmp_path: Path, line: str, complaint: str) -> None:
    folder = write_folder(tmp_path, corpus=[json.dumps(DOCUMENT), line])
    with pytest.raises(DataError, match=complaint) as raised:
        list(read_corpus(folder))
    assert "\n" not in str(raised.value)


def test_bytes_that_are_not_utf8_are_placed(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    (folder / "corpus.jsonl").write_bytes(json.dumps(DOCUMENT).encode() + b'\n{"_id": "\xff"}\n')
    with pytest.raises(DataError, match=r"corpus\.jsonl line 2: not UTF-8"):
        list(read_corpus(folder))


def test_a_missing_folder_says_what_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not found: give a BEIR folder"):
        list(read_queries(tmp_path / "nowhere"))


def test_a_missing_split_names_those_that_exist(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    assert splits(folder) == ["train"]
    with pytest.raises(DataError, match=r"splits there: train"):
        read_qrels(folder, "dev")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [("q1 d1 1", "1 columns instead of 3"), ("q1\td1\tgood", "the grade 'good' is not a whole number")],
)
def test_a_broken_judgment_is_one_clear_line(tmp_path: Path, line: str, complaint: str) -> None:
    folder = write_folder(tmp_path, qrels=f"query-id\tcorpus-id\tscore\n{line}\n")
    with pytest.raises(DataError, match=rf"qrels/train\.tsv line 2: {complaint}"):
        read_qrels(folder, "train")


def test_a_split_holds_judged_requests_best_grade_first(tmp_path: Path) -> None:
    queries = [
        json.dumps({"_id": "q1", "text": "first"}),
        json.dumps({"_id": "q2", "text": "second", "metadata": {"pub_date": "2020/01/31"}}),
        json.dumps({"_id": "q3", "text": "nothing relevant"}),
    ]
    qrels = "query-id\tcorpus-id\tscore\nq2\ta\t1\nq2\tb\t2\nq2\tc\t0\nq2\td\t1\nq3\ta\t0\nq1\ta\t1\n"
    rows = read_split(write_folder(tmp_path, queries=queries, qrels=qrels), "train")
    assert [(row.id, row.relevant) for row in rows] == [("q2", ("b", "a", "d")), ("q1", ("a",))]
    assert [row.grades for row in rows] == [(2.0, 1.0, 1.0), ()]
    assert [row.max_date for row in rows] == ["2020/01/31", None]


def test_a_judged_request_without_text_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, qrels="q9\td1\t1\n")
    with pytest.raises(DataError, match=r"judges request 'q9', which queries\.jsonl does not hold"):
        read_split(folder, "train")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.text(min_size=1, max_size=8), st.text(max_size=40), min_size=1, max_size=6))
def test_whatever_json_can_hold_comes_back(tmp_path: Path, texts: dict[str, str]) -> None:
    lines = [json.dumps({"_id": key, "title": text[::-1], "text": text}) for key, text in texts.items()]
    documents = list(read_corpus(write_folder(tmp_path, corpus=lines)))
    assert {document.id: document.text for document in documents} == texts
    assert all(document.title == document.text[::-1] for document in documents)


@pytest.mark.skipif("DEEPRETRIEVAL_DATA" not in os.environ, reason="DEEPRETRIEVAL_DATA is not set")
def test_scifact_is_read_whole() -> None:
    folder = Path(os.environ["DEEPRETRIEVAL_DATA"]) / "scifact"
    assert sum(1 for _ in read_corpus(folder)) == 5183
    assert len(read_split(folder, "train")) == 809
    assert len(read_split(folder, "test")) == 300
