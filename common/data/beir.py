"""A reader of folders in BEIR layout: `corpus.jsonl`, `queries.jsonl` and `qrels/<split>.tsv`.

The layout is that of Thakur et al. 2021 (arXiv 2104.08663). Nothing here needs more than the base install, so that
a rewarder host or a search server can read a corpus without the packages of the learner.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.tasks.row import Row

CORPUS_FILE = "corpus.jsonl"
QUERIES_FILE = "queries.jsonl"
# The day a request was asked is called `max_date` by our own folders and `pub_date` by DeepRetrieval's rows.
MAX_DATE_KEYS = ("max_date", "pub_date")


class DataError(ValueError):
    """Input data that cannot be used. The message is one line and says where it is and what to do."""


@dataclass(frozen=True, slots=True)
class Document:
    """One line of `corpus.jsonl`."""

    id: str
    title: str
    text: str
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Query:
    """One line of `queries.jsonl`."""

    id: str
    text: str
    metadata: dict[str, Any] = field(default_factory=dict)


def read_corpus(folder: str | Path) -> Iterator[Document]:
    """Yield the documents of a BEIR folder in file order.

    Raises:
        DataError: the file is missing, a line is not a JSON object, has no `_id` or `text`, or repeats an id.
    """
    seen: set[str] = set()
    for place, row in _json_lines(Path(folder) / CORPUS_FILE):
        document_id = _text_field(row, "_id", place)
        if document_id in seen:
            raise DataError(f"{place}: the id {document_id!r} occurs twice: give every document its own")
        seen.add(document_id)
        title = _text_field(row, "title", place, default="")
        yield Document(document_id, title, _text_field(row, "text", place), _metadata(row, place))


def read_queries(folder: str | Path) -> Iterator[Query]:
    """Yield the requests of a BEIR folder in file order.

    Raises:
        DataError: the file is missing, or a line is not a JSON object with `_id` and `text`.
    """
    for place, row in _json_lines(Path(folder) / QUERIES_FILE):
        yield Query(_text_field(row, "_id", place), _text_field(row, "text", place), _metadata(row, place))


def read_qrels(folder: str | Path, split: str) -> dict[str, dict[str, int]]:
    """Read the judgments of one split: request id -> document id -> grade, both in file order.

    Raises:
        DataError: the split does not exist (its message names those that do), or a line is not three columns.
    """
    path = Path(folder) / "qrels" / f"{split}.tsv"
    if not path.is_file():
        there = ", ".join(splits(folder)) or "none"
        raise DataError(f"{path} not found (splits there: {there}): name a split of this folder")
    judgments: dict[str, dict[str, int]] = {}
    for number, line in enumerate(_open_lines(path), start=1):
        if not line.strip() or (number == 1 and line.lower().startswith("query-id")):
            continue
        place = f"qrels/{path.name} line {number}"
        query_id, document_id, grade = _judgment(line, place)
        judgments.setdefault(query_id, {})[document_id] = grade
    return judgments


def splits(folder: str | Path) -> list[str]:
    """Names of the splits that have judgments in this folder, sorted."""
    return sorted(path.stem for path in (Path(folder) / "qrels").glob("*.tsv"))


def read_split(folder: str | Path, split: str) -> list[Row]:
    """Requests of one split that have at least one relevant document, in the order of the judgments.

    `relevant` holds the ids judged above zero, best grade first and otherwise in the order of the judgments; grades
    are left out where all are 1.

    Raises:
        DataError: as the readers above, or a judgment names a request that `queries.jsonl` does not hold.
    """
    judgments = read_qrels(folder, split)
    queries = {query.id: query for query in read_queries(folder)}
    rows = []
    for query_id, grades in judgments.items():
        relevant = tuple(sorted((d for d, grade in grades.items() if grade > 0), key=lambda d: -grades[d]))
        if not relevant:
            continue
        if query_id not in queries:
            raise DataError(
                f"qrels/{split}.tsv judges request {query_id!r}, which {QUERIES_FILE} does not hold: "
                "add the request or remove its judgments"
            )
        query = queries[query_id]
        judged = tuple(float(grades[document]) for document in relevant)
        graded = () if set(judged) == {1.0} else judged
        rows.append(Row(query.id, query.text, relevant, _max_date(query), query.metadata, graded))
    return rows


def _max_date(query: Query) -> str | None:
    for key in MAX_DATE_KEYS:
        if value := query.metadata.get(key):
            return str(value)
    return None


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place for messages, object) for every non-empty line."""
    for number, line in enumerate(_open_lines(path), start=1):
        if not line.strip():
            continue
        place = f"{path.name} line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{place}: not JSON ({error.msg}): fix or remove the line") from None
        if not isinstance(row, dict):
            raise DataError(f"{place}: not a JSON object: fix or remove the line")
        yield place, row


def _open_lines(path: Path) -> Iterator[str]:
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                try:
                    yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError:
                    message = f"{path.name} line {number}: not UTF-8: fix or remove the line"
                    raise DataError(message) from None
    except FileNotFoundError:
        message = f"{path} not found: give a BEIR folder (corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv)"
        raise DataError(message) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check the path and its permissions") from None


def _text_field(row: dict[str, Any], key: str, place: str, default: str | None = None) -> str:
    value = row.get(key, default)
    # Several published BEIR folders number their documents instead of naming them.
    if key == "_id" and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is None:
        if default is not None:
            return default
        raise DataError(f"{place}: no {key!r}: add it or remove the line")
    if not isinstance(value, str):
        raise DataError(f"{place}: {key!r} is not a string: fix or remove the line")
    return value


def _metadata(row: dict[str, Any], place: str) -> dict[str, Any]:
    metadata = row.get("metadata")
    if metadata is None:
        return {}
    if not isinstance(metadata, dict):
        raise DataError(f"{place}: 'metadata' is not an object: fix or remove the line")
    return metadata


def _judgment(line: str, place: str) -> tuple[str, str, int]:
    columns = line.rstrip("\r\n").split("\t")
    if len(columns) != 3:
        raise DataError(f"{place}: {len(columns)} columns instead of 3 separated by tabs: fix or remove the line")
    try:
        return columns[0], columns[1], int(columns[2])
    except ValueError:
        raise DataError(f"{place}: the grade {columns[2]!r} is not a whole number: fix or remove the line") from None
