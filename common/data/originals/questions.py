"""Questions with answers as DPR publishes them (Karpukhin et al. 2020, arXiv 2004.04906): NQ, TriviaQA, SQuAD.

Three packings of the same: JSON lines {question, answers} (pyserini's topics, the original's raw data), one JSON list
(`biencoder-*.json.gz`, whose passages are not needed), and tab-separated `*.qa.csv` with a list written as in Python.
"""

from __future__ import annotations

import ast
import csv
from collections.abc import Iterator, Mapping
from pathlib import Path

from common.data.beir import CORPUS_FILE, DataError
from common.data.originals.raw_files import (
    RawSet,
    files_below,
    json_objects,
    open_text,
    split_of,
    text_of,
    texts_of,
)
from common.tasks.row import Row

_JSON = (".jsonl", ".json")
_TABLES = (".csv", ".tsv")


def read_question_set(folder: Path, roles: Mapping[str, str]) -> RawSet:
    """Every file whose name says which split it is. Raises DataError."""
    found = RawSet()
    for path in files_below(folder, *_JSON, *_TABLES):
        split = split_of(path, roles)
        if path.name == CORPUS_FILE:
            found.corpus = path
        elif split is not None:
            pairs = list(_pairs(path))
            rows = [
                Row(f"{split}-{number}", question, answers=answers)
                for number, (question, answers) in enumerate(pairs, start=len(found.splits.get(split, ())))
                if answers
            ]
            found.leave_out("no answer", len(pairs) - len(rows))
            found.add(split, rows)
    return found


def _pairs(path: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    if any(path.name.endswith((suffix, f"{suffix}.gz")) for suffix in _TABLES):
        yield from _pairs_of_table(path)
        return
    for place, row in json_objects(path):
        yield text_of(row, ("question", "query", "input"), place), texts_of(row, ("answers", "answer", "label"))


def _pairs_of_table(path: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    with open_text(path) as file:
        for number, columns in enumerate(csv.reader(file, delimiter="\t"), start=1):
            try:
                question, answers = columns
                yield question, texts_of({"answers": ast.literal_eval(answers)}, ("answers",))
            except (ValueError, SyntaxError):
                message = f"{path.name} line {number}: not a question and a list of answers: fix or remove the line"
                raise DataError(message) from None
