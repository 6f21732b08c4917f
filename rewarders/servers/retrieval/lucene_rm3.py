"""RM3 in the JVM of a worker process: from a query and its first ranking to the Lucene query of the second search.

The index holds no document vectors; Anserini, where it finds none, analyzes the documents' texts, and so do we.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from rewarders.servers.retrieval.documents import DocumentStore
from rewarders.servers.retrieval.lucene_index import FIELD, analyzer, contents_of
from rewarders.servers.retrieval.lucene_jvm import as_java, java_class
from rewarders.servers.retrieval.lucene_wire import Ranked
from rewarders.servers.retrieval.rm3 import COMMONEST, FeedbackDocument, expanded_query

_TERMS_REMEMBERED: Final = 1 << 16


class Rm3QueryBuilder:
    """Builds second queries; threads may share it.

    Args:
        searcher: of the index. store, digest: the documents that it was made from, opened when they are first needed.
    """

    def __init__(self, searcher: Any, store: Path, digest: str) -> None:
        self._reader = as_java("org.apache.lucene.index.IndexReader", searcher.getIndexReader())
        self._documents = np.float32(self._reader.numDocs())
        self._store, self._digest = store, digest
        self._opening = threading.Lock()
        self._analyzer = analyzer()
        self._analyze = java_class("io.anserini.analysis.AnalyzerUtils").analyze
        self._list = java_class("java.util.ArrayList")
        self._mapper = java_class("com.fasterxml.jackson.databind.ObjectMapper")()
        self._term = java_class("org.apache.lucene.index.Term")
        self._term_query = java_class("org.apache.lucene.search.TermQuery")
        self._boosted = java_class("org.apache.lucene.search.BoostQuery")
        self._builder = java_class("org.apache.lucene.search.BooleanQuery$Builder")
        self._should = java_class("org.apache.lucene.search.BooleanClause$Occur").SHOULD
        self._is_common = lru_cache(_TERMS_REMEMBERED)(self._look_up)

    def build(self, text: str, first: Ranked) -> Any:
        """The second query. first: the best FEEDBACK_DOCUMENTS for `text`, in which the analyzer leaves a term.

        Raises:
            A Java exception: it has too many clauses.
        """
        texts = [contents_of(title, body) for title, body in self._titles_and_texts(first.ids)]
        query, *documents = self._analyzed([text, *texts])
        fed_back = [FeedbackDocument(*pair) for pair in zip(first.scores, documents, strict=True)]
        builder = self._builder()
        for term, weight in expanded_query(query, fed_back, self._is_common).items():
            clause = as_java("org.apache.lucene.search.Query", self._term_query(self._term(FIELD, term)))
            boosted = self._boosted(clause, weight)
            builder.add(boosted, self._should)  # no call in between: see `java_class`
        return builder.build()

    def _titles_and_texts(self, ids: Sequence[str]) -> list[tuple[str, str]]:
        with self._opening:
            store = self._opened
        return store.fetch(ids)

    @cached_property
    def _opened(self) -> DocumentStore:
        """Opening counts the documents, which takes seconds for millions: not before somebody asks for RM3."""
        return DocumentStore(self._store, self._digest)

    def _analyzed(self, texts: Sequence[str]) -> list[list[str]]:
        """The terms of each text, out of the JVM at once."""
        found = self._list()
        for text in texts:
            terms_of_text = self._analyze(self._analyzer, text)
            found.add(terms_of_text)
        terms: list[list[str]] = msgspec.json.decode(self._mapper.writeValueAsString(found))
        return terms

    def _look_up(self, term: str) -> bool:
        share = np.float32(self._reader.docFreq(self._term(FIELD, term))) / self._documents
        return bool(share > COMMONEST)
