"""The original's own rows, as its parquet files hold them (github.com/pat-jj/DeepRetrieval; `DeepRetrieval/datasets`).

A row has `input` or `query` or `question`, its judgments under names that differ by task, and a `prompt` whose chat
template is part of the text (`chat_markup`). SciFact and FiQA have a row per pair of request and document there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from common.data.beir import DataError
from common.data.originals.chat_markup import take_apart
from common.data.originals.raw_files import RawSet, files_below, split_of, text_of, texts_of
from common.data.originals.reviews import date_of
from common.data.originals.sql_sets import databases_below, schema_of
from common.data.splits import merge_requests
from common.tasks.row import ORIGINAL_PROMPT, Row

_SCHEMA_BEGINS = "Database Schema:\n"
_SCHEMA_ENDS = ("\nExternal Knowledge:", "\nNote: ")
_BLOCK = 1024


def read_parquet_set(folder: Path, task: str, roles: Mapping[str, str]) -> RawSet:
    """Every .parquet file whose name says which split it is.

    Raises:
        DataError: a file is broken or has other columns, or pyarrow is not installed.
    """
    databases = databases_below(folder) if task == "text_to_sql" else {}
    found = RawSet(databases=databases)
    schemas = {name: schema_of(path) for name, path in databases.items()}
    for path in files_below(folder, ".parquet"):
        split = split_of(path, roles)
        if split is None:
            continue
        start = len(found.splits.get(split, ()))
        read = [
            row_of(row, task, f"{split}-{start + number}", f"{path.name} row {number}", schemas)
            for number, row in enumerate(_rows(path))
        ]
        # A row per request and document: they are one request's judgments.
        found.add(split, merge_requests(read) if task == "ranking" else read)
    return found


def row_of(row: Mapping[str, Any], task: str, number: str, place: str, schemas: Mapping[str, str] | None = None) -> Row:
    """One row of the original's. task: whose columns it has. number: its id, unless it brings one. Raises DataError."""
    prompt = _prompt(row)
    metadata = {} if prompt is None else {ORIGINAL_PROMPT: msgspec.to_builtins(take_apart(prompt))}
    identifier = str(row.get("qid") or number)
    if task == "text_to_sql":
        return _sql_row(row, identifier, place, schemas or {}, prompt or "", metadata)
    text = text_of(row, ("input", "query", "question"), place)
    if task == "evidence_seeking":
        return Row(identifier, text, answers=_judged(row), metadata=metadata)
    relevant, grades = _graded(row)
    return Row(identifier, text, relevant, date_of(row, place), metadata, grades)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        message = f"{path.name} is a parquet file: pip install 'deepretrieval-async[data]' to read it"
        raise DataError(message) from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_BLOCK):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is no parquet file that can be read ({error}): download it again") from None


def _prompt(row: Mapping[str, Any]) -> str | None:
    prompt = row.get("prompt")
    return str(prompt[0]["content"]) if prompt else None


def _judged(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Ids or answers: a column of their own, or what the reward is told."""
    for key in ("target", "label"):
        # A single number under `label` is the grade of the one document under `target`.
        if row.get(key) is not None and not (key == "label" and isinstance(row[key], int | float)):
            return texts_of(row, (key,))
    truth = (row.get("reward_model") or {}).get("ground_truth") or {}
    return texts_of(truth, ("target",))


def _graded(row: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Relevant ids, best grade first, and their grades; () for grades that are all 1."""
    judged, score = _judged(row), row.get("score")
    if not isinstance(score, list) or len(score) != len(judged):
        return judged, ()
    pairs = sorted(((d, float(g)) for d, g in zip(judged, score, strict=True) if g > 0), key=lambda pair: -pair[1])
    grades = tuple(grade for _, grade in pairs)
    return tuple(document for document, _ in pairs), grades if set(grades) != {1.0} else ()


def _sql_row(
    row: Mapping[str, Any],
    identifier: str,
    place: str,
    schemas: Mapping[str, str],
    prompt: str,
    metadata: dict[str, Any],
) -> Row:
    database = text_of(row, ("db_id",), place)
    return Row(
        identifier,
        text_of(row, ("question",), place),
        metadata=metadata,
        database=database,
        tables=schemas.get(database) or _schema_in(prompt),
        knowledge=str(row.get("knowledge") or ""),
        gold_sql=text_of(row, ("sql",), place),
    )


def _schema_in(prompt: str) -> str:
    """The schema as the prompt shows it, where the database is not at hand."""
    schema = prompt.partition(_SCHEMA_BEGINS)[2]
    for end in _SCHEMA_ENDS:
        schema = schema.partition(end)[0]
    return schema.strip()
