"""What lies on disk: whole lines only, outages tried again, one evaluation per folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.errors import LaunchError
from deploy.evaluation.records import EvaluationFolder, QueryRecord, RecordFile, SampleRecord, read_records

DONE = QueryRecord("1", "a request", [SampleRecord("scored", "text \udc80", 3, query="q", reward=1.0)], ranking=["7"])
OUTAGE = QueryRecord("2", "b", apart="unavailable", reason="HTTP 503")
LONG = QueryRecord("3", "c", apart="too_long", reason="900 tokens")


def written(path: Path, *records: QueryRecord) -> Path:
    file = RecordFile(path)
    for record in records:
        file.append(record)
    file.close()
    return path


def test_a_torn_line_is_cut_and_noticed(tmp_path: Path) -> None:
    path = written(tmp_path / "queries.jsonl", DONE, LONG)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:40])
    file = RecordFile(path)
    assert file.cut_bytes == 40
    assert file.records == {"1": DONE, "3": LONG}
    file.append(OUTAGE)
    file.close()
    assert [record.id for record in read_records(path)] == ["1", "3", "2"]


def test_outages_are_tried_again_and_what_never_changes_is_not(tmp_path: Path) -> None:
    path = written(tmp_path / "queries.jsonl", OUTAGE, DONE, LONG)
    assert list(RecordFile(path).records) == ["1", "3"]
    assert [record.id for record in read_records(path)] == ["1", "3"]


def test_a_run_file_needs_rankings(tmp_path: Path) -> None:
    without = QueryRecord("4", "d", DONE.samples)
    path = written(tmp_path / "queries.jsonl", DONE, LONG, without)
    assert list(RecordFile(path).records) == ["1", "3", "4"]
    assert list(RecordFile(path, rankings=True).records) == ["1", "3"]


def test_a_broken_line_before_the_last_is_named(tmp_path: Path) -> None:
    path = tmp_path / "queries.jsonl"
    path.write_text('{"id": "1"\n{"id": "2", "request": "b"}\n')
    with pytest.raises(LaunchError, match="line 1"):
        RecordFile(path)


def test_a_folder_belongs_to_one_evaluation(tmp_path: Path) -> None:
    folder = EvaluationFolder(tmp_path / "out")
    with folder.alone():
        assert not folder.claim({"model": "a", "data": "b"}, {"model": "tiny"})
        assert folder.claim({"model": "a", "data": "b"}, {})
        with pytest.raises(LaunchError, match="another model: name another folder"):
            folder.claim({"model": "x", "data": "b"}, {})
        with pytest.raises(LaunchError, match="another evaluation is at work"), EvaluationFolder(folder.path).alone():
            pass
    with EvaluationFolder(folder.path).alone():
        pass
