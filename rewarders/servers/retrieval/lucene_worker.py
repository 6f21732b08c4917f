"""A JVM process that answers BM25 queries: `python -m rewarders.servers.retrieval.lucene_worker`.

Frames come on standard input and leave on what was standard output: the JVM may print there as it likes.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from rewarders.frames import frame, read_frame, write_all
from rewarders.servers.retrieval.backend import Query
from rewarders.servers.retrieval.boolean_query import BooleanSyntaxError
from rewarders.servers.retrieval.documents import DocumentStore
from rewarders.servers.retrieval.id_table import IdTable
from rewarders.servers.retrieval.lucene_index import build_index, open_searcher
from rewarders.servers.retrieval.lucene_jvm import JavaMissing, java_class, start_jvm
from rewarders.servers.retrieval.lucene_queries import QueryBuilder
from rewarders.servers.retrieval.lucene_rm3 import Rm3QueryBuilder
from rewarders.servers.retrieval.lucene_wire import (
    Answer,
    Answers,
    Batch,
    Build,
    Built,
    Failed,
    FromWorker,
    Open,
    Opened,
    Progressed,
    Ranked,
    Refused,
    ToWorker,
)
from rewarders.servers.retrieval.rm3 import FEEDBACK_DOCUMENTS

_INPUT: Final = 0
_MOST: Final = 2**31 - 1
# Java says so of queries that are too much for it.
_TOO_MUCH: Final = ("TooManyClauses", "TooManyNestedClauses", "StackOverflowError")


class _Hit(msgspec.Struct):
    doc: int
    score: float


class _Total(msgspec.Struct):
    value: int


class _TopDocs(msgspec.Struct):
    """What Jackson makes of Lucene's TopDocs: one call over JNI for a batch, instead of three per hit."""

    scoreDocs: list[_Hit]  # noqa: N815 (Lucene's name)
    totalHits: _Total  # noqa: N815


class _Index:
    """Answers batches with several threads."""

    def __init__(self, setup: Open) -> None:
        folder = Path(setup.folder)
        self._ids = IdTable(folder)
        self._searcher = open_searcher(folder, setup.k1, setup.b)
        self._queries = QueryBuilder(setup.boolean)
        self._rm3 = Rm3QueryBuilder(self._searcher, Path(setup.documents), setup.digest)
        self._collectors = java_class("org.apache.lucene.search.TopScoreDocCollector")
        self._mapper = java_class("com.fasterxml.jackson.databind.ObjectMapper")()
        self._list = java_class("java.util.ArrayList")
        self._decoder = msgspec.json.Decoder(list[_TopDocs])
        self._exact = len(self._ids) <= setup.exact_up_to
        self._threads = setup.threads
        self._pool = ThreadPoolExecutor(setup.threads) if setup.threads > 1 else None

    def __len__(self) -> int:
        return len(self._ids)

    def answer(self, queries: Sequence[Query]) -> list[Answer]:
        """Every thread takes each n-th query."""
        if self._pool is None or len(queries) == 1:
            return self._answer_alone(queries)
        shares = [queries[first :: self._threads] for first in range(self._threads)]
        answers: list[Answer] = [Failed("no answer")] * len(queries)
        for first, share in enumerate(self._pool.map(self._answer_alone, shares)):
            answers[first :: self._threads] = share
        return answers

    def _answer_alone(self, queries: Sequence[Query]) -> list[Answer]:
        """The answers, all rankings taken out of the JVM at once."""
        found = self._list()
        answers: list[Answer | None] = []
        for query in queries:
            top = self._search(query)
            if isinstance(top, Ranked | Refused | Failed):
                answers.append(top)
            else:
                found.add(top)
                answers.append(None)
        rankings = iter(self._rankings(found))
        return [next(rankings) if answer is None else answer for answer in answers]

    def _search(self, query: Query) -> Any:
        """Lucene's TopDocs, or an answer where there are none."""
        try:
            lucene_query = self._rm3_query(query.term) if query.rm3 else self._queries.build(query.term)
            if lucene_query is None:
                return Ranked((), (), 0)
            return self._top(lucene_query, query.k)
        except BooleanSyntaxError as error:
            return Refused(str(error))
        except Exception as error:  # pyjnius throws what Java threw as one class
            words = str(getattr(error, "classname", "")) + str(error)
            if any(name in words for name in _TOO_MUCH):
                return Refused("the query has too many different words or is too deep")
            return Failed(" ".join(f"{type(error).__name__}: {error}".split())[:300])

    def _rm3_query(self, text: str) -> Any:
        """The query of the second search, or None where the analyzer leaves nothing of the text."""
        first = self._queries.words(text)
        if first is None:
            return None
        found, top = self._list(), self._top(first, FEEDBACK_DOCUMENTS)
        found.add(top)
        return self._rm3.build(text, self._rankings(found)[0])

    def _top(self, lucene_query: Any, k: int) -> Any:
        """Lucene's TopDocs."""
        k = min(k, len(self._ids))
        counted = _MOST if self._exact else max(k, 1000)
        return self._searcher.search(lucene_query, self._collectors.createSharedManager(k, None, counted))

    def _rankings(self, found: Any) -> list[Ranked]:
        """What a Java list of TopDocs holds."""
        return [self._ranked(top) for top in self._decoder.decode(self._mapper.writeValueAsString(found))]

    def _ranked(self, top: _TopDocs) -> Ranked:
        # Java writes the shortest digits that tell a float from its neighbours.
        scores = np.array([hit.score for hit in top.scoreDocs], dtype=np.float32)
        return Ranked(self._ids.at([hit.doc for hit in top.scoreDocs]), tuple(scores.tolist()), top.totalHits.value)


def main() -> int:
    """Serve until the backend closes the pipe."""
    output = os.dup(1)
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which then closes the pipe
    encoder = msgspec.msgpack.Encoder()
    decoder = msgspec.msgpack.Decoder(ToWorker)

    def send(message: FromWorker) -> None:
        write_all(output, frame(encoder.encode(message)))

    index: _Index | None = None
    while (received := read_frame(_INPUT)) is not None:
        match decoder.decode(received):
            case Build(documents, digest, folder):
                start_jvm()
                store = DocumentStore(Path(documents), digest)
                build_index(store, Path(folder), lambda done, total: send(Progressed(done, total)))
                send(Built())
                return 0
            case Open() as setup:
                start_jvm()
                index = _Index(setup)
                send(Opened(len(index), _software()))
            case Batch(queries):
                assert index is not None
                send(Answers(tuple(index.answer(queries))))
    return 0


def _software() -> str:
    java = java_class("java.lang.System").getProperty("java.version")
    return f"Lucene {java_class('org.apache.lucene.util.Version').LATEST.toString()}, Java {java}"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except JavaMissing as error:
        print(error, file=sys.stderr)
        sys.exit(1)
