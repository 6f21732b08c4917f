"""pyserini used as its documentation shows, in a process of its own: what our BM25 is compared with.

`python -m benchmarks.pyserini_library CORPUS INDEX` indexes a BEIR folder with pyserini's indexer, unless INDEX is
there already, says `{"documents": N}`, and then answers each line of `PyseriniLibrary.search` with the seconds that one
`batch_search` took (ids and scores of every hit read once, as whoever ranks must) and, if wanted, the hits.

pyserini rounds the scores of hits to 4 digits and lowers equal ones by a millionth each; exact scores are those of its
`compute_query_document_score`, which are Lucene's own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from common.data.beir import read_corpus

Hits = list[list[tuple[str, float]]]


class PyseriniLibrary:
    """The parent's end of such a process; use it as a context manager."""

    def __init__(self, corpus: Path, index: Path) -> None:
        # Importing the searcher asks for a key that is never used.
        environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name, str(corpus), str(index)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**environment, "OPENAI_API_KEY": "none", "OMP_NUM_THREADS": "1"},
        )
        self.documents: int = self._line()["documents"]

    def search(
        self,
        queries: list[str],
        k: int,
        threads: int = 1,
        k1: float = 0.9,
        b: float = 0.4,
        hits: bool = True,
        rm3: bool = False,
    ) -> tuple[float, Hits]:
        """Seconds, and the hits of every query (none unless they are wanted). rm3: with its `set_rm3()`."""
        answer = self._order(queries=queries, k=k, threads=threads, k1=k1, b=b, hits=hits, rm3=rm3)
        return answer["seconds"], answer["hits"]

    def exact_scores(self, query: str, documents: list[str], k1: float = 0.9, b: float = 0.4) -> list[float]:
        """BM25 of a bag of words for each document, not rounded."""
        scores: list[float] = self._order(exact=query, documents=documents, k1=k1, b=b)["scores"]
        return scores

    def _order(self, **order: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._line()

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the pyserini process ended: is the extra `lucene` installed? (deepretrieval doctor)")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def main(corpus: Path, index: Path) -> None:
    """Serve until standard input ends."""
    from rewarders.servers.retrieval.lucene_jvm import start_jvm

    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the JVM prints
    start_jvm()
    if not index.is_dir():
        _build(corpus, index)
    from pyserini.search.lucene import LuceneSearcher

    searcher = LuceneSearcher(str(index))
    print(json.dumps({"documents": searcher.num_docs}), file=output, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        answer = _exact(searcher, order) if "exact" in order else _search(searcher, order)
        print(json.dumps(answer), file=output, flush=True)


def _search(searcher: Any, order: dict[str, Any]) -> dict[str, Any]:
    searcher.set_bm25(order["k1"], order["b"])
    if order["rm3"]:
        searcher.set_rm3()
    else:
        searcher.unset_rm3()
    qids = [str(number) for number in range(len(order["queries"]))]
    started = time.perf_counter()
    found = searcher.batch_search(order["queries"], qids, k=order["k"], threads=order["threads"])
    hits = [[(hit.docid, hit.score) for hit in found[qid]] for qid in qids]
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "hits": hits if order["hits"] else []}


def _exact(searcher: Any, order: dict[str, Any]) -> dict[str, Any]:
    from rewarders.servers.retrieval.lucene_jvm import java_class

    bm25 = java_class("org.apache.lucene.search.similarities.BM25Similarity")(order["k1"], order["b"])
    reader = searcher.index_reader
    return {"scores": [reader.compute_query_document_score(d, order["exact"], bm25) for d in order["documents"]]}


def _build(corpus: Path, index: Path) -> None:
    from pyserini.index.lucene import LuceneIndexer

    # RM3 wants the vectors of the documents; searches without it do not look at them.
    indexer = LuceneIndexer(args=["-index", str(index), "-storeDocvectors"], threads=1)
    for document in read_corpus(corpus):
        indexer.add_doc_dict({"id": document.id, "contents": f"{document.title}\n{document.text}"})
    indexer.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
