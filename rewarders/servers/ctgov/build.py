"""Builds the SQLite FTS5 index of a folder of study records: once per content, in a cache folder, atomically."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import sqlite3
import zlib
from collections.abc import Iterator
from datetime import date, datetime, timedelta
from pathlib import Path

from common.data.beir import DataError
from rewarders.servers.ctgov.areas import FIELDS, RANGE_FIELDS, TEXT_FIELDS, Field, Kind
from rewarders.servers.ctgov.records import Record, data_files, nct_id, read_records, values_at
from rewarders.servers.ctgov.values import span_of
from rewarders.servers.index_cache import Progress, cached_index, default_cache_folder
from rewarders.servers.text import search_words

# Part of the file name: an index written by other code is never opened.
INDEX_FORMAT = 1
# Before and after every value of a field. Words to FTS5 (private use counts as a letter there), but in no query: so no
# phrase runs from one value into the next, and a phrase with a mark is bound to the begin or end of a value.
VALUE_START, VALUE_END = "\ue000", "\ue001"


_COLUMNS = ", ".join(field.column for field in TEXT_FIELDS)
# Records are numbered by rank: 1 is the one first posted last; records without that date come last.
_SCHEMA = f"""
CREATE TABLE records (rank INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, record BLOB NOT NULL);
CREATE TABLE numbers (field TEXT NOT NULL, low REAL NOT NULL, rank INTEGER NOT NULL);
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE VIRTUAL TABLE words USING fts5({_COLUMNS}, content='', tokenize='unicode61 remove_diacritics 0');
"""
_INSERT_WORDS = f"INSERT INTO words (rowid, {_COLUMNS}) VALUES (?{', ?' * len(TEXT_FIELDS)})"
_PHASE = re.compile(r"PHASE(?=\d$)")


def ensure_index(corpus: Path, cache_folder: Path | None = None, progress: Progress | None = None) -> Path:
    """Path of the index of a folder, which is built if no index of the same content is in the cache.

    Raises:
        DataError: the records are missing or broken, or the index cannot be written.
    """
    digest = _fingerprint(corpus)
    folder = cache_folder or default_cache_folder("ctgov")
    report = progress or (lambda done, total: None)
    return cached_index(
        folder, f"{digest[:32]}-ctgov-v{INDEX_FORMAT}.sqlite", lambda target: _build(corpus, target, digest, report)
    )


def _fingerprint(corpus: Path) -> str:
    """SHA-256 of the names and contents of the files that records are read from."""
    digest = hashlib.sha256()
    for path in data_files(corpus):
        try:
            with path.open("rb") as file:
                digest.update(f"{path.name}\n".encode())
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}): correct or remove it") from None
    return digest.hexdigest()


def _build(corpus: Path, target: Path, digest: str, progress: Progress) -> None:
    records = read_records(corpus)
    # Of one day the last in the folder is the newest, as if the folder had grown over time.
    positions = sorted(range(len(records)), key=lambda at: (_first_posted(records[at]), at), reverse=True)
    target.unlink(missing_ok=True)
    with contextlib.closing(sqlite3.connect(target)) as connection:
        # The file only counts once it is complete and renamed, so it needs no journal while it is written.
        connection.execute("PRAGMA journal_mode = OFF")
        connection.execute("PRAGMA synchronous = OFF")
        connection.executescript(_SCHEMA)
        for rank, position in enumerate(positions, start=1):
            if rank % 500 == 1:
                progress(rank - 1, len(records))
            _insert(connection, rank, records[position])
        connection.execute("INSERT INTO facts VALUES ('data_timestamp', ?)", (_timestamp(records, digest),))
        connection.execute("CREATE INDEX numbers_by_value ON numbers (field, low)")
        connection.execute("INSERT INTO words (words) VALUES ('optimize')")
        progress(len(records), len(records))
        connection.commit()


def _insert(connection: sqlite3.Connection, rank: int, record: Record) -> None:
    packed = zlib.compress(json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace"))
    connection.execute("INSERT INTO records VALUES (?, ?, ?)", (rank, nct_id(record), packed))
    connection.execute(_INSERT_WORDS, (rank, *(_searchable(record, field) for field in TEXT_FIELDS)))
    connection.executemany("INSERT INTO numbers VALUES (?, ?, ?)", _numbers(record, rank))


def _searchable(record: Record, field: Field) -> str:
    """The words of all values of a field, each value between marks."""
    values = values_at(record, field.path)
    if field.kind is Kind.ENUM:
        # `PHASE3` is found as records write it, and as readers are shown it.
        values += [shown for value in values if (shown := _PHASE.sub("PHASE ", value)) != value]
    texts = (" ".join(search_words(value)) for value in values)
    return " ".join(f"{VALUE_START} {text} {VALUE_END}" for text in texts if text)


def _numbers(record: Record, rank: int) -> Iterator[tuple[str, float, int]]:
    """A date that names only its month counts as the first day of it."""
    for field in RANGE_FIELDS:
        for value in values_at(record, field.path):
            span = span_of(value, field.kind)
            if span is not None:
                yield field.name, span[0], rank


def _first_posted(record: Record) -> float:
    found = values_at(record, FIELDS["StudyFirstPostDate"].path)
    span = span_of(found[0], Kind.DATE) if found else None
    return span[0] if span else 0.0


def _timestamp(records: list[Record], digest: str) -> str:
    """A time for /version: the newest day in the records, and a time of day made from their content, so that it
    changes whenever they do and is the same on every host."""
    paths = [FIELDS[name].path for name in ("StudyFirstPostDate", "LastUpdatePostDate")]
    spans = [span_of(value, Kind.DATE) for record in records for path in paths for value in values_at(record, path)]
    newest = max((span[0] for span in spans if span), default=float(date(1970, 1, 1).toordinal()))
    midnight = datetime.combine(date.fromordinal(int(newest)), datetime.min.time())
    return (midnight + timedelta(seconds=int(digest[:8], 16) % 86_400)).isoformat()
