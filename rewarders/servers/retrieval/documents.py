"""The documents of a BEIR folder in an SQLite file: by id where texts are wanted, in order where they are indexed."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from common.data.beir import CORPUS_FILE, DataError, Document, read_corpus
from rewarders.servers.index_cache import Progress, cached_index, content_digest, default_cache_folder, opened_index

STORE_FORMAT: Final = 1
_SCHEMA: Final = "CREATE TABLE documents (id TEXT PRIMARY KEY, title TEXT NOT NULL, text TEXT NOT NULL) WITHOUT ROWID"


class DocumentStore:
    """Titles and texts by id. May be asked from several threads, which take turns.

    Args:
        path: a file made by `of_corpus`. digest: of the corpus it was made from.

    Raises:
        DataError: the file is no such store.
    """

    def __init__(self, path: Path, digest: str) -> None:
        self.path = path
        self.digest = digest
        self._lock = threading.Lock()
        with opened_index(path, "document store") as self._connection:
            self._size: int = self._connection.execute("SELECT count(*) FROM documents").fetchone()[0]

    @classmethod
    def of_corpus(
        cls, corpus: Path, cache_folder: Path | None = None, progress: Progress | None = None
    ) -> DocumentStore:
        """Open the store of a BEIR folder; the first time, build it (and call `progress(done, total)`).

        Raises:
            DataError: the corpus is missing, empty or broken, or the store cannot be written.
        """
        digest, lines = content_digest(corpus / CORPUS_FILE)
        report = progress or (lambda done, total: None)
        path = cached_index(
            cache_folder or default_cache_folder("retrieval"),
            f"{digest[:32]}-documents-v{STORE_FORMAT}.sqlite",
            lambda target: _build(corpus, target, lines, report),
        )
        return cls(path, digest)

    def __len__(self) -> int:
        return self._size

    def close(self) -> None:
        """Release the file."""
        self._connection.close()

    def fetch(self, ids: Sequence[str]) -> list[tuple[str, str]]:
        """(title, text) of each id, in this order. Raises KeyError for an id the corpus does not hold."""
        statement = "SELECT title, text FROM documents WHERE id = ?"
        with self._lock:
            found = [self._connection.execute(statement, (document,)).fetchone() for document in ids]
        if None in found:
            raise KeyError(ids[found.index(None)])
        return found

    def in_order(self) -> Iterator[Document]:
        """All documents, by the bytes of their ids; from one thread at a time."""
        for document, title, text in self._connection.execute("SELECT id, title, text FROM documents ORDER BY id"):
            yield Document(document, title, text)


def _build(corpus: Path, target: Path, total: int, progress: Progress) -> None:
    target.unlink(missing_ok=True)
    with contextlib.closing(sqlite3.connect(target)) as connection:
        # The file only counts once it is complete and renamed, so it needs no journal while it is written.
        connection.execute("PRAGMA journal_mode = OFF")
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute(_SCHEMA)
        connection.executemany("INSERT INTO documents VALUES (?, ?, ?)", _rows(corpus, total, progress))
        if connection.execute("SELECT count(*) FROM documents").fetchone()[0] == 0:
            raise DataError(f"{corpus / CORPUS_FILE} holds no document: name a BEIR folder with a corpus")
        connection.commit()


def _rows(corpus: Path, total: int, progress: Progress) -> Iterator[tuple[str, str, str]]:
    for position, document in enumerate(read_corpus(corpus)):
        if position % 1000 == 0:
            progress(position, max(total, position))
        texts = (document.id, document.title, document.text)
        # JSON can spell half a character; SQLite and Lucene cannot.
        yield tuple(text.encode("utf-8", "replace").decode() for text in texts)  # type: ignore[misc]
    progress(total, total)
