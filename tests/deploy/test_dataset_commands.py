"""`deepretrieval data list|prepare|index` as a user runs them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from common.config.schema import Bm25Config, DenseConfig
from common.data.beir import DataError
from common.data.catalogue import DATASETS
from common.tasks import load_task
from deploy import cli
from deploy.index_building import Cost, build_index, estimate, extrapolated, require_room
from rewarders.servers.retrieval.vectors import BLOCK_ROWS
from tests.common.data.raw_worlds import write_beir, write_lines, write_reviews

CONFIGS = Path(__file__).parents[2] / "configs" / "original"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DEEPRETRIEVAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_corpus(folder: Path, documents: int) -> Path:
    chance = random.Random(1)
    write_lines(
        folder / "corpus.jsonl",
        [
            {"_id": f"d{n}", "title": "", "text": " ".join(f"w{chance.randrange(500)}" for _ in range(20))}
            for n in range(documents)
        ],
    )
    return folder


def test_the_catalogue_fits_the_tasks_and_the_configs() -> None:
    for dataset in DATASETS.values():
        if dataset.task:
            task = load_task(dataset.task, **({"dataset": dataset.variant} if dataset.variant else {}))
            assert set(dataset.engines) & set(task.engines)
            assert {"train", "test"} <= set(dataset.splits) or dataset.name == "wikisql"
        assert not dataset.corpus_of or DATASETS[dataset.corpus_of].documents == dataset.documents
        assert dataset.licence
        assert dataset.sources or dataset.parts
    named = {
        line.partition("$DEEPRETRIEVAL_DATA/")[2].partition(",")[0].strip("}")
        for path in CONFIGS.glob("*.yaml")
        for line in path.read_text().splitlines()
        if "$DEEPRETRIEVAL_DATA/" in line
    }
    assert named <= set(DATASETS), "every set that a config of the original names is in the catalogue"


def test_list_shows_what_is_here(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_beir(DATASETS["scifact"], cache / "datasets" / "raw" / "scifact")
    write_reviews(DATASETS["ctgov"], cache / "datasets" / "raw" / "ctgov")
    assert cli.main(["data", "prepare", "scifact"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(cache / "datasets" / "scifact")
    assert cli.main(["data", "list"]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in DATASETS)
    assert "5,183" in table
    assert "~12,600" in table
    assert cli.main(["data", "list", "--json"]) == 0
    listed = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)["datasets"]}
    assert list(listed) == list(DATASETS)
    assert listed["scifact"]["prepared_rows"] == {"test": 20, "train": 18, "dev": 2}
    assert {name: entry["here"] for name, entry in listed.items() if entry["here"]} == {
        "scifact": "prepared",
        "ctgov": "downloaded",
    }
    assert listed["pubmed"]["splits"]["train"] == {"rows": 12600, "basis": "estimated"}


def test_an_own_file_needs_its_name(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "prepare", "own"]) == 1
    assert "name your file" in capsys.readouterr().err
    write_lines(cache / "mine.jsonl", [{"text": f"q{n}", "answers": ["x"]} for n in range(10)])
    assert cli.main(["data", "prepare", "own", "--raw", str(cache / "mine.jsonl"), "--out", str(cache / "out")]) == 0
    assert "was cut from train (seed 0)" in capsys.readouterr().err
    assert {path.name for path in (cache / "out" / "rows").iterdir()} == {"train.jsonl", "dev.jsonl", "test.jsonl"}


def test_an_index_is_built_where_the_server_looks_for_it(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_corpus(tmp_path / "corpus", 30)
    assert cli.main(["data", "index", "--corpus", str(corpus), "--engine", "bm25", "--sample", "0"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(cache / "indexes")
    built = {path.name for path in (cache / "indexes").iterdir()}
    progress: list[tuple[int, int]] = []
    build_index("bm25", Bm25Config(k1=1.2), corpus, cache / "indexes", lambda *done: progress.append(done))
    assert progress == [], "nothing is built twice"
    assert {path.name for path in (cache / "indexes").iterdir()} == built


def test_an_estimate_is_measured_and_leaves_nothing(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_corpus(tmp_path / "corpus", 300)
    command = ["data", "index", "--corpus", str(corpus), "--engine", "bm25", "--sample", "100", "--estimate"]
    assert cli.main(command) == 0
    assert "300 documents: about" in capsys.readouterr().err
    assert not (cache / "indexes").exists()


class Interrupted(Exception):  # noqa: N818 - nothing failed
    pass


def test_a_dense_index_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", BLOCK_ROWS + 50)
    done: list[tuple[int, int]] = []

    def interrupt(rows: int, total: int) -> None:
        if rows == BLOCK_ROWS:
            raise Interrupted

    with pytest.raises(Interrupted):
        build_index("dense", DenseConfig(), corpus, tmp_path / "cache", interrupt)
    build_index("dense", DenseConfig(), corpus, tmp_path / "cache", lambda *now: done.append(now))
    assert all(rows >= BLOCK_ROWS for rows, _ in done), "the first block was kept"


def test_the_cost_is_a_line_through_two_measurements() -> None:
    few, more = Cost(50, 50, 10_000, 2.0), Cost(1050, 1050, 210_000, 4.0)
    assert extrapolated(101_050, few, more) == Cost(101_050, 1050, 20_210_000, 204.0)
    assert str(extrapolated(101_050, few, more)) == "101,050 documents: about 20 MB and 3 min (measured on 1,050)"
    assert extrapolated(2_000, few, Cost(1050, 1050, 210_000, 1.5)).seconds == 1.5, "noise is no negative time"
    assert "a matter of a minute" in str(Cost(10, 0, 0, 0.0))


def test_a_disk_that_is_too_small_is_named_before(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the index takes about 1000000\.0 TB"):
        require_room(Cost(10, 5, 10**18, 1.0), tmp_path / "not" / "there")
    require_room(Cost(10, 5, 1, 1.0), tmp_path)


def test_one_thing_is_indexed(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "index", "--engine", "bm25"]) == 1
    assert "name one thing to index" in capsys.readouterr().err
    assert cli.main(["data", "index", "nq", "--engine", "bm25"]) == 1
    assert "corpus.jsonl" in capsys.readouterr().err


def test_a_small_corpus_is_not_measured(tmp_path: Path) -> None:
    assert estimate("bm25", Bm25Config(), write_corpus(tmp_path, 50)) == Cost(50, 0, 0, 0.0)
