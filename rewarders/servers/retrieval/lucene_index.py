"""Builds and opens the Lucene index of a document store, in the JVM of a worker process.

The index holds one field, `contents` (title and text), analyzed as pyserini does by default: English, Porter stems, no
stopwords. Documents are numbered by the bytes of their ids. So Lucene's own order of equal scores, by number, is the
order by id that pyserini sorts for, and an id is found by its number without reading stored fields.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from rewarders.servers.retrieval.documents import DocumentStore
from rewarders.servers.retrieval.id_table import write_ids
from rewarders.servers.retrieval.lucene_jvm import as_java, java_class

# Part of the index's name and version: change it whenever the same corpus would be indexed differently.
ANALYZER_VERSION: Final = "english-porter-lucene9-1"
FIELD: Final = "contents"
_BUFFER_MIB: Final = 256.0


def contents_of(title: str, text: str) -> str:
    """What is indexed of a document."""
    return f"{title}\n{text}"


def analyzer() -> Any:
    """The analyzer of documents and queries."""
    return java_class("io.anserini.analysis.DefaultEnglishAnalyzer").newStemmingInstance("porter")


def build_index(documents: DocumentStore, folder: Path, progress: Callable[[int, int], None]) -> None:
    """Write the index and its table of ids into an empty folder."""
    config = java_class("org.apache.lucene.index.IndexWriterConfig")(analyzer())
    # Merges neighbours only, so numbers stay in the order of insertion.
    config.setMergePolicy(java_class("org.apache.lucene.index.LogDocMergePolicy")())
    config.setRAMBufferSizeMB(_BUFFER_MIB)
    writer = java_class("org.apache.lucene.index.IndexWriter")(_directory(folder), config)
    document = java_class("org.apache.lucene.document.Document")()
    not_stored = java_class("org.apache.lucene.document.Field$Store").NO
    contents = java_class("org.apache.lucene.document.TextField")(FIELD, "", not_stored)
    document.add(contents)
    total = len(documents)

    def indexed() -> Iterator[str]:
        for number, each in enumerate(documents.in_order()):
            if number % 1000 == 0:
                progress(number, total)
            contents.setStringValue(contents_of(each.title, each.text))
            writer.addDocument(document)
            yield each.id

    write_ids(folder, indexed())
    writer.forceMerge(1)
    writer.commit()
    writer.close()
    progress(total, total)


def open_searcher(folder: Path, k1: float, b: float) -> Any:
    """An IndexSearcher that scores by BM25; threads may share it."""
    reader = java_class("org.apache.lucene.index.DirectoryReader").open(_directory(folder))
    searcher = java_class("org.apache.lucene.search.IndexSearcher")(
        as_java("org.apache.lucene.index.IndexReader", reader)
    )
    searcher.setSimilarity(java_class("org.apache.lucene.search.similarities.BM25Similarity")(k1, b))
    return searcher


def _directory(folder: Path) -> Any:
    path = java_class("java.nio.file.Paths").get(str(folder))
    return java_class("org.apache.lucene.store.FSDirectory").open(path)
