"""Readers of raw files, splits, and the original's prompts."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import msgspec
import pytest

from common.data.beir import DataError
from common.data.catalogue import DATASETS
from common.data.originals.chat_markup import PLAIN, TEMPLATES, prompt_of, published_text, take_apart
from common.data.originals.parquet_rows import row_of
from common.data.originals.raw_files import split_of
from common.data.prepare import OWN, prepare, read_record
from common.data.rows import read_requests
from common.data.splits import cut, merge_requests, with_distinct_ids, without_shared
from common.tasks import Row
from common.tasks.row import to_reference
from tests.common.data.raw_worlds import make_database, write_beir, write_lines, write_parquet_file, write_reviews

REAL = os.environ.get("DEEPRETRIEVAL_DATA")


def rows_of(folder: Path, split: str = "train") -> list[Row]:
    return read_requests(folder, split)


# ---------------------------------------------------------------------- splits


@pytest.mark.parametrize(
    ("name", "roles", "split"),
    [
        ("train.jsonl", {}, "train"),
        ("biencoder-squad1-dev.json.gz", {}, "dev"),
        ("raw_dev.jsonl", {}, "dev"),
        ("test_full.parquet", {}, "test"),
        ("val.jsonl", {}, "dev"),
        ("val.jsonl", {"val": "test"}, "test"),
        ("val.parquet", {"val": ""}, None),
        ("dev.json", {"dev": "test"}, "test"),
        ("tables.json", {}, None),
        ("latest.jsonl", {}, None),
    ],
)
def test_a_file_says_which_split_it_is(name: str, roles: dict[str, str], split: str | None) -> None:
    assert split_of(Path(name), roles) == split


def test_what_splits_share_stays_in_the_later_stage_and_is_counted() -> None:
    splits = {
        "train": [Row("1", "One"), Row("2", "two"), Row("3", "three"), Row("5", "same", database="b")],
        "dev": [Row("a", " two "), Row("b", "four")],
        "test": [Row("x", "ONE"), Row("y", "four"), Row("z", "same", database="a")],
    }
    left, taken = without_shared(splits)
    assert {split: [row.id for row in rows] for split, rows in left.items()} == {
        "train": ["3", "5"],
        "dev": ["a"],
        "test": ["x", "y", "z"],
    }
    assert taken == {"train/test": 1, "dev/test": 1, "train/dev": 1}


def test_a_cut_repeats_itself_and_keeps_databases_whole() -> None:
    rows = [Row(str(number), f"r{number}", database=f"d{number % 5}") for number in range(50)]
    stay, off = cut(rows, seed=3, size=12)
    assert (stay, off) == cut(rows, seed=3, size=12)
    assert len(off) == 20
    assert not {row.database for row in stay} & {row.database for row in off}
    assert sorted(stay + off, key=lambda row: int(row.id)) == rows
    assert cut(rows, seed=4, size=12) != (stay, off)
    plain = [Row(str(number), f"r{number}") for number in range(50)]
    assert [len(part) for part in cut(plain, seed=0)] == [45, 5]
    assert [len(part) for part in cut(plain[:1], seed=0, size=5)] == [1, 0]


def test_pairs_of_one_request_become_its_judgments() -> None:
    rows = [Row("1", "a claim", ("d1",)), Row("2", "A  claim", ("d2",), grades=(2.0,)), Row("3", "another", ("d1",))]
    merged = merge_requests(rows)
    assert [(row.id, row.relevant, row.grades) for row in merged] == [
        ("1", ("d2", "d1"), (2.0, 1.0)),
        ("3", ("d1",), ()),
    ]


def test_ids_are_made_distinct_over_all_splits() -> None:
    made = with_distinct_ids({"train": [Row("1", "a"), Row("1", "b")], "test": [Row("1", "c"), Row("2", "d")]})
    assert [row.id for rows in made.values() for row in rows] == ["1", "1-train", "1-test", "2"]


# ---------------------------------------------------------------------- the original's rows

PROMPTS = {
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n\nU\n<|im_end|>\n"
    "<|im_start|>assistant\nP \n<think>\n",
    "chatml_open": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU\nAssistant: no\n\nAssistant: P \n<think>",
    "llama_text": "<|begin_of_text|>System: S\nUser: U User: U\n\nAssistant: P\n<think>\n",
    "text": "A conversation.\n\nUser: U\nO: x\n\nAssistant: P \n<think>\n",
    PLAIN: "Write a query for this",
}


@pytest.mark.parametrize("shape", sorted(PROMPTS))
def test_a_baked_prompt_comes_apart_and_together_again(shape: str) -> None:
    prompt = take_apart(PROMPTS[shape])
    assert prompt.template == shape
    assert published_text(prompt) == PROMPTS[shape]
    parts = [message["content"] for message in prompt.messages]
    assert not any(mark in part for part in (*parts, prompt.prefix) for mark in ("<|im_", "<|begin_of_text|>"))
    if shape != PLAIN:
        assert [message["role"] for message in prompt.messages] == ["system", "user"]
        assert prompt.prefix.startswith("P")
    assert set(PROMPTS) == {*TEMPLATES, PLAIN}


@pytest.mark.skipif(REAL is None, reason="DEEPRETRIEVAL_DATA is not set")
@pytest.mark.parametrize(
    ("file", "task", "template"),
    [
        ("deepretrieval_pubmed/prompt_example.json", "publication_search", "text"),
        ("deepretrieval_ctgov/prompt_example.json", "trial_search", "text"),
        ("deepretrieval_sql/prompt_example_bird.json", "text_to_sql", "chatml"),
        ("deepretrieval_sql/prompt_example_spider.json", "text_to_sql", "chatml"),
    ],
)
def test_whole_rows_of_the_original(file: str, task: str, template: str, tmp_path: Path) -> None:
    """Each through a parquet file, as the hub has them."""
    published = json.loads((Path(REAL or "") / file).read_text())
    name = {"publication_search": "pubmed", "trial_search": "ctgov"}.get(task, "bird")
    write_parquet_file(tmp_path / "raw" / "test_full.parquet", [published])
    prepared = prepare(DATASETS[name], tmp_path / "raw", tmp_path / name)
    (row,) = rows_of(tmp_path / name, "test")
    assert prepared.prompts == 1
    prompt = prompt_of(row.metadata)
    assert prompt is not None
    assert prompt.template == template
    assert published_text(prompt) == published["prompt"][0]["content"]
    assert prompt.prefix.endswith("<think>\n")
    assert row.text.strip() in prompt.messages[1]["content"]
    if task == "text_to_sql":
        assert row.gold_sql == published["sql"]
        assert row.tables.startswith("C")
        assert row.tables in prompt.messages[1]["content"]
        assert "Knowledge" not in row.tables
    else:
        assert list(row.relevant) == published["label"]
        assert row.max_date == published["pub_date"]


def test_a_ticket_does_not_carry_the_prompt() -> None:
    prompt = msgspec.to_builtins(take_apart(PROMPTS["text"]))
    reference = to_reference(Row("1", "a", ("d",), metadata={"original_prompt": prompt, "mine": 1}))
    assert reference == {"id": "1", "text": "a", "relevant": ["d"], "metadata": {"mine": 1}}


def test_graded_columns_of_the_original() -> None:
    published = {"qid": "q7", "query": "a", "target": ["d1", "d2", "d3"], "score": [1, 0, 2]}
    row = row_of(published, "ranking", "n", "here")
    assert (row.id, row.relevant, row.grades) == ("q7", ("d3", "d1"), (2.0, 1.0))
    pair = row_of({"query": "a", "target": 4983, "label": 1}, "ranking", "n", "here")
    assert (pair.id, pair.relevant) == ("n", ("4983",))
    assert row_of({"input": "a", "label": ["x", "x"]}, "evidence_seeking", "n", "here").answers == ("x",)


def test_rows_of_beir_get_the_prompts_of_the_parquet_files(tmp_path: Path) -> None:
    dataset = DATASETS["nfcorpus"]
    write_beir(dataset, tmp_path / "raw")
    rows = [
        {"qid": "test-1", "query": "request 1 of test", "target": ["x"], "prompt": [{"content": PROMPTS["text"]}]},
    ]
    write_parquet_file(tmp_path / "raw" / "local_index_search" / "nfcorpus" / "test.parquet", rows)
    prepared = prepare(dataset, tmp_path / "raw", tmp_path / "nfcorpus")
    assert (prepared.rows["test"], prepared.prompts) == (20, 1)
    row = next(row for row in rows_of(tmp_path / "nfcorpus", "test") if row.id == "test-1")
    assert prompt_of(row.metadata) == take_apart(PROMPTS["text"])
    assert row.relevant == ("doc-test-1",), "judgments stay BEIR's"


# ---------------------------------------------------------------------- a user's own set


def test_two_fields_are_enough(tmp_path: Path) -> None:
    lines = [{"text": f"question {n}", "relevant": [n]} for n in range(40)]
    write_lines(tmp_path / "mine.jsonl", lines)
    prepared = prepare(OWN, tmp_path / "mine.jsonl", tmp_path / "out")
    assert prepared.rows == {"train": 33, "test": 4, "dev": 3}
    rows = [row for split in prepared.rows for row in rows_of(tmp_path / "out", split)]
    assert sorted(rows, key=lambda row: int(row.id.removeprefix("own-"))) == [
        Row(f"own-{n + 1}", f"question {n}", (str(n),)) for n in range(40)
    ]


def test_own_questions_about_databases_get_their_tables(tmp_path: Path) -> None:
    make_database(tmp_path / "mine" / "office.sqlite")
    write_lines(tmp_path / "mine" / "train.jsonl", [{"text": "who", "database": "office", "gold_sql": "SELECT 1"}])
    write_lines(tmp_path / "mine" / "test.jsonl", [{"text": "when", "answers": "today", "id": 7}])
    prepare(OWN, tmp_path / "mine", tmp_path / "out")
    assert rows_of(tmp_path / "out")[0].tables == "CREATE TABLE staff (name TEXT, age INTEGER);"
    assert rows_of(tmp_path / "out", "test") == [Row("7", "when", answers=("today",))]
    linked = tmp_path / "out" / "databases" / "office.sqlite"
    assert linked.stat().st_ino == (tmp_path / "mine" / "office.sqlite").stat().st_ino


def test_a_folder_in_beir_layout_is_an_own_set_too(tmp_path: Path) -> None:
    write_beir(DATASETS["nfcorpus"], tmp_path / "raw")
    prepared = prepare(OWN, tmp_path / "raw", tmp_path / "out")
    assert prepared.rows == {"dev": 20, "test": 20, "train": 20}
    assert (tmp_path / "out" / "corpus.jsonl").is_symlink()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"}', "line 1: give it one of relevant, answers, gold_sql"),
        ('{"relevant": ["d"]}', "line 1: .*text"),
        ('{"text": "a", "relevant": ["d"], "colour": 1}', "line 1: .*colour"),
        ("[1]", "line 1: not a JSON object"),
        ("{", "cannot be read as JSON"),
    ],
)
def test_a_wrong_line_of_an_own_file_is_named(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=message):
        prepare(OWN, tmp_path / "mine.jsonl", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------- preparing


def test_the_same_input_gives_the_same_rows_and_replaces_the_old(tmp_path: Path) -> None:
    dataset = DATASETS["scifact"]
    write_beir(dataset, tmp_path / "raw")
    first = prepare(dataset, tmp_path / "raw", tmp_path / "out", seed=5)
    bytes_before = {path.name: path.read_bytes() for path in (tmp_path / "out" / "rows").iterdir()}
    assert first == prepare(dataset, tmp_path / "raw", tmp_path / "out", seed=5)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out" / "rows").iterdir()} == bytes_before
    assert read_record(tmp_path / "out") == first
    assert first.cut == {"dev": 5}
    assert prepare(dataset, tmp_path / "raw", tmp_path / "out", dev_rows=7).rows == {"test": 20, "train": 13, "dev": 7}


def test_shared_requests_are_reported(tmp_path: Path) -> None:
    write_reviews(DATASETS["ctgov"], tmp_path / "raw")
    train = tmp_path / "raw" / "train.jsonl"
    train.write_text(train.read_text() + (tmp_path / "raw" / "test.jsonl").read_text().splitlines()[0] + "\n")
    prepared = prepare(DATASETS["ctgov"], tmp_path / "raw", tmp_path / "ctgov")
    assert prepared.shared == {"train/test": 1}
    assert prepared.rows == {"dev": 3, "test": 3, "train": 3}


def test_nothing_of_the_user_is_overwritten(tmp_path: Path) -> None:
    dataset = DATASETS["ctgov"]
    write_reviews(dataset, tmp_path / "raw")
    for out in (tmp_path / "raw", tmp_path / "raw" / "out", tmp_path):
        with pytest.raises(DataError, match="lie in one another"):
            prepare(dataset, tmp_path / "raw", out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="has not written"):
        prepare(dataset, tmp_path / "raw", tmp_path / "mine")
    with pytest.raises(DataError, match="is not there: download the set first"):
        prepare(dataset, tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no rows of ctgov"):
        prepare(dataset, tmp_path / "empty", tmp_path / "out")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "mine"


def test_a_set_of_the_hub_lies_packed(tmp_path: Path) -> None:
    """BeIR/NAME and BeIR/NAME-qrels: the same files, packed, judgments in a folder of their own."""
    dataset = DATASETS["nfcorpus"]
    write_beir(dataset, tmp_path / "plain")
    (tmp_path / "raw").mkdir()
    for name in ("corpus.jsonl", "queries.jsonl"):
        packed = gzip.compress((tmp_path / "plain" / "nfcorpus" / name).read_bytes())
        (tmp_path / "raw" / f"{name}.gz").write_bytes(packed)
    (tmp_path / "plain" / "nfcorpus" / "qrels").rename(tmp_path / "raw" / "qrels")
    assert prepare(dataset, tmp_path / "raw", tmp_path / "out").rows == {"dev": 20, "test": 20, "train": 20}
    assert len((tmp_path / "out" / "corpus.jsonl").read_text().splitlines()) == 60


def test_rows_without_a_database_are_left_out_and_counted(tmp_path: Path) -> None:
    make_database(tmp_path / "raw" / "databases" / "office.sqlite")
    questions = [{"question": f"q{n}", "db_id": name, "SQL": "SELECT 1"} for n, name in enumerate(["office", "gone"])]
    (tmp_path / "raw" / "dev.json").write_text(json.dumps(questions))
    prepared = prepare(DATASETS["bird"], tmp_path / "raw", tmp_path / "out")
    assert (prepared.rows, prepared.left_out) == ({"test": 1}, {"no database": 1})
