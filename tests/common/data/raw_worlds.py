"""Raw files as each source publishes them, three requests a split, and an engine that holds what they ask for."""

from __future__ import annotations

import csv
import gzip
import json
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common.data.catalogue import Dataset
from common.tasks import Row
from rewarders.engines.base import SearchEngine, SearchRequest, SearchResult

SPLITS = ("train", "dev", "test")
GOLD = "SELECT name FROM staff WHERE age > {age}"


class WordEngine(SearchEngine):
    """Finds the documents that hold every word of the query, in the order they were given."""

    def __init__(self, documents: dict[str, str]) -> None:
        self._documents = documents

    async def check(self) -> None:
        pass

    async def search(self, request: SearchRequest) -> SearchResult:
        words = set(request.term.lower().split())
        found = [name for name, text in self._documents.items() if words <= set(text.lower().split())]
        texts = tuple(self._documents[name] for name in found[: request.retmax]) if request.with_texts else None
        titles = ("",) * len(texts) if texts is not None else None
        return SearchResult(tuple(found[: request.retmax]), len(found), texts=texts, titles=titles)


def engine_for(row: Row) -> WordEngine:
    """Every relevant document, best first, or a passage with the first answer, says what the row asks."""
    documents = dict.fromkeys(row.relevant, row.text)
    if row.answers:
        documents["passage"] = f"{row.text} {row.answers[0]}"
    return WordEngine(documents | {"other": "nothing of it"})


def request(split: str, number: int) -> str:
    return f"request {number} of {split}"


# ---------------------------------------------------------------------- one writer per layout


def write_reviews(dataset: Dataset, raw: Path) -> None:
    label = "publication_pmids" if dataset.name == "pubmed" else "trial_nctids"
    for split in SPLITS:
        rows = [
            {
                "id": f"MLSET-{split}-{number}",
                "origin": {"pmid": "1", "title": "a review", "abstract": "of studies"},
                "pico": {"P": request(split, number), "I": "a drug", "C": "placebo", "O": "survival"},
                label: [f"{split}{number}a", f"{split}{number}b"],
                "pub_date": "2019/03/01",
            }
            for number in range(3)
        ]
        write_lines(raw / f"{split}.jsonl", rows)


def write_questions(dataset: Dataset, raw: Path) -> None:
    """Under the names of DPR's own files."""
    raw.mkdir(parents=True)
    for source, split in zip(dataset.sources, SPLITS, strict=False):
        name = source.address.rpartition("/")[2]
        pairs = [(request(split, number), [f"answer {number}", "another"]) for number in range(3)]
        opened: Callable[..., Any] = gzip.open if name.endswith(".gz") else open
        with opened(raw / name, "wt", newline="") as file:
            if ".csv" in name:
                csv.writer(file, delimiter="\t").writerows((question, repr(answers)) for question, answers in pairs)
            else:
                json.dump([{"question": q, "answers": a, "positive_ctxs": [{"text": "x"}]} for q, a in pairs], file)


def write_beir(dataset: Dataset, raw: Path) -> None:
    """As in BEIR's archives; SciFact has no dev."""
    folder = raw / dataset.name
    parts = [split for split in SPLITS if split in dataset.splits]
    queries = [{"_id": f"{split}-{n}", "text": request(split, n)} for split in parts for n in range(20)]
    write_lines(folder / "queries.jsonl", queries)
    documents = [f"doc-{query['_id']}" for query in queries]
    write_lines(folder / "corpus.jsonl", [{"_id": d, "title": "", "text": "words", "metadata": {}} for d in documents])
    for split in parts:
        judged = [f"{split}-{n}\tdoc-{split}-{n}\t{1 + n % 2}" for n in range(20)]
        (folder / "qrels").mkdir(exist_ok=True)
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *judged]) + "\n")


def write_parquet(dataset: Dataset, raw: Path) -> None:
    """The original's rows: columns as its builders write them."""
    folder = raw / "local_index_search" / dataset.name
    for split in ("train", "val", "test"):
        rows = [original_row(dataset, split, number) for number in range(20 if split == "train" else 3)]
        write_parquet_file(folder / f"{split}.parquet", rows)
    if dataset.task == "text_to_sql":
        make_database(raw / "databases" / "office.sqlite")


def original_row(dataset: Dataset, split: str, number: int) -> dict[str, Any]:
    text = request(split, number)
    prompt = (
        f"<|im_start|>system\nAn assistant.<|im_end|>\n<|im_start|>user\nRewrite.\n{text}<|im_end|>\n"
        "<|im_start|>assistant\nLet me see. \n<think>\n"
    )
    common = {
        "data_source": f"{dataset.name}_{split}",
        "prompt": [{"role": "user", "content": prompt}],
        "ability": "literature_mining",
        "extra_info": {"index": number, "split": split},
    }
    if dataset.task == "text_to_sql":
        sql = GOLD.format(age=number)
        truth = {"style": "rule", "ground_truth": {"target": sql}}
        return {"question": text, "db_id": "office", "sql": sql, "reward_model": truth, **common}
    label = [f"p-{split}-{number}"]
    truth = {"style": "rule", "ground_truth": {"target": label}}
    return {"input": text, "label": label, "reward_model": truth, **common}


def write_sql(dataset: Dataset, raw: Path) -> None:
    if dataset.name == "bird":
        # Databases of their own for train: its dev is cut by database.
        for number in range(3):
            make_database(raw / "train" / "train_databases" / f"office{number}" / f"office{number}.sqlite")
        questions = [bird_question("train", number, f"office{number % 3}") for number in range(20)]
        write_json(raw / "train" / "train.json", questions)
        make_database(raw / "dev_20240627" / "dev_databases" / "shop" / "shop.sqlite")
        dev = [{**bird_question("dev", number, "shop"), "question_id": number} for number in range(3)]
        write_json(raw / "dev_20240627" / "dev.json", dev)
        write_json(raw / "dev_20240627" / "dev_tied_append.json", dev[:1])
        write_json(raw / "dev_20240627" / "dev_tables.json", [{"db_id": "shop"}])
        return
    folder = raw / "spider_data"
    for split, database in (("train_spider", "office"), ("train_others", "office"), ("dev", "shop"), ("test", "lab")):
        place = "test_database" if split == "test" else "database"
        make_database(folder / place / database / f"{database}.sqlite")
        rows = [
            {"db_id": database, "question": request(split, n), "query": GOLD.format(age=n), "sql": {"from": []}}
            for n in range(3)
        ]
        write_json(folder / f"{split}.json", rows)
    write_json(folder / "tables.json", [{"db_id": "office"}])


def bird_question(split: str, number: int, database: str) -> dict[str, Any]:
    return {
        "db_id": database,
        "question": request(split, number),
        "evidence": "old means an age above a number",
        "SQL": GOLD.format(age=number),
    }


WRITERS: dict[str, Callable[[Dataset, Path], None]] = {
    "reviews": write_reviews,
    "questions": write_questions,
    "beir": write_beir,
    "original": write_parquet,
    "sql": write_sql,
}


# ---------------------------------------------------------------------- files


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_parquet_file(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def make_database(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE IF NOT EXISTS staff (name TEXT, age INTEGER)")
    connection.executemany("INSERT INTO staff VALUES (?, ?)", [("Ada", 36), ("Bo", 1), ("Çelik", 2)])
    connection.commit()
    connection.close()


def write_passages(raw: Path) -> None:
    raw.mkdir(parents=True)
    lines = ["id\ttext\ttitle", '1\t"Aaron ""the"" prophet"\tAaron', "2\tA second passage\tAaron"]
    (raw / "psgs_w100.tsv.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
