"""Builds the SQLite FTS5 index of a BEIR folder: once per content, in a cache folder, atomically."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from common.data.beir import CORPUS_FILE, DataError, Document, read_corpus
from rewarders.servers.dates import date_range, made_up_date
from rewarders.servers.index_cache import Progress, cached_index, content_digest, default_cache_folder
from rewarders.servers.text import search_words

# Part of the file name: an index written by other code is never opened.
INDEX_FORMAT = 2

# Both tables are numbered by rank: 1 is the newest document; of the documents of one day the last in the corpus
# is the newest, as if the file had grown over time.
_SCHEMA = """
CREATE TABLE documents (rank INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, pub_date INTEGER NOT NULL); CREATE
VIRTUAL TABLE words USING fts5(title, abstract, content='', tokenize='unicode61 remove_diacritics 0'); CREATE
TEMP TABLE staging (position INTEGER PRIMARY KEY, id TEXT, pub_date INTEGER, title TEXT, abstract TEXT);
"""
_BY_DATE = "FROM staging ORDER BY pub_date DESC, position DESC"
_RANK = "row_number() OVER (ORDER BY pub_date DESC, position DESC)"


def ensure_index(corpus: Path, cache_folder: Path | None = None, progress: Progress | None = None) -> Path:
    """Path of the index of a BEIR folder, which is built if no index of the same content is in the cache.

    Raises:
        DataError: the corpus is missing or has a broken line, or the index cannot be written.
    """
    digest, lines = content_digest(corpus / CORPUS_FILE)
    folder = cache_folder or default_cache_folder("pubmed")
    report = progress or (lambda done, total: None)
    return cached_index(
        folder, f"{digest[:32]}-v{INDEX_FORMAT}.sqlite", lambda target: _build(corpus, target, lines, report)
    )


def _build(corpus: Path, target: Path, total: int, progress: Progress) -> None:
    target.unlink(missing_ok=True)
    with contextlib.closing(sqlite3.connect(target)) as connection:
        # The file only counts once it is complete and renamed, so it needs no journal while it is written.
        connection.execute("PRAGMA journal_mode = OFF")
        connection.execute("PRAGMA synchronous = OFF")
        connection.executescript(_SCHEMA)
        connection.executemany("INSERT INTO staging VALUES (?, ?, ?, ?, ?)", _rows(corpus, total, progress))
        connection.execute(f"INSERT INTO documents SELECT {_RANK}, id, pub_date {_BY_DATE}")
        connection.execute(f"INSERT INTO words (rowid, title, abstract) SELECT {_RANK}, title, abstract {_BY_DATE}")
        connection.execute("INSERT INTO words (words) VALUES ('optimize')")
        connection.commit()


def _rows(corpus: Path, total: int, progress: Progress) -> Iterator[tuple[int, str, int, str, str]]:
    for position, document in enumerate(read_corpus(corpus)):
        if position % 500 == 0:
            progress(position, max(total, position))
        title, abstract = (" ".join(search_words(text)) for text in (document.title, document.text))
        yield position, document.id, _publication_day(document, position, total), title, abstract
    progress(total, total)


def _publication_day(document: Document, position: int, total: int) -> int:
    """The document's own `metadata.pub_date` as YYYYMMDD (first day of a month or year), or a made-up one."""
    written = document.metadata.get("pub_date")
    if written is None:
        return made_up_date(position, total)
    days = None if ":" in str(written) else date_range(str(written))
    if days is None:
        raise DataError(f"document {document.id!r}: pub_date {written!r} is no date: write YYYY, YYYY/MM or YYYY/MM/DD")
    return days[0]
