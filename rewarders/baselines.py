"""Fixed rewrites that a trained policy has to beat, measured through the same engine.

* "original": the request as it is (engines join its words by an implicit AND);
* "and_all", "or_all": AND, OR of all its words;
* "rarest_1" … "rarest_5": AND of its k rarest words. These know the document frequencies of the corpus,
  which the policy never sees.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from common.data.beir import read_corpus
from common.metrics.ranking import retrieval_metrics
from common.tasks import Row
from rewarders.cache import SearchCache
from rewarders.engines.base import BadQuery, SearchEngine, SearchRequest
from rewarders.retry import Retrier
from rewarders.servers.text import search_words

RAREST_K: Final = (1, 2, 3, 4, 5)
_CONCURRENCY: Final = 16


def document_frequencies(corpus_dir: str | Path) -> Counter[str]:
    """Number of documents of a BEIR folder that hold each word, in title or text. Raises DataError as
    `read_corpus`.
    """
    frequencies: Counter[str] = Counter()
    for document in read_corpus(corpus_dir):
        frequencies.update(set(search_words(f"{document.title} {document.text}")))
    return frequencies


def baseline_queries(text: str, frequencies: Mapping[str, int]) -> dict[str, str]:
    """The query of each baseline for one request; with fewer than k words, "rarest_k" takes them all.

    A word the corpus does not hold cannot be found, so it counts as no word for "rarest_k"; ties go to
    the earlier word. A request without a word gets itself everywhere.
    """
    words = list(dict.fromkeys(search_words(text)))
    known = sorted((word for word in words if frequencies.get(word, 0) > 0), key=lambda word: frequencies[word])
    queries = {"original": text, "and_all": " AND ".join(words), "or_all": " OR ".join(words)}
    for k in RAREST_K:
        queries[f"rarest_{k}"] = " AND ".join(known[:k] or words)
    return {name: query or text for name, query in queries.items()}


def best_rarest(recalls: Mapping[str, Sequence[float]]) -> str:
    """Name of the "rarest_k" baseline with the highest mean; the smaller k wins a tie."""
    names = [f"rarest_{k}" for k in RAREST_K]
    return max(names, key=lambda name: sum(recalls[name]))


async def evaluate_baselines(
    rows: Sequence[Row],
    engine: SearchEngine,
    corpus_dir: str | Path,
    *,
    retmax: int,
    sort: str = "pub_date",
    retrier: Retrier | None = None,
) -> dict[str, list[float]]:
    """Recall of every baseline on every row: name -> one value in [0, 1] per row, in order.

    A query the engine refuses finds nothing. Raises EngineUnavailable if the engine cannot be asked,
    after retries (never an invented 0), and DataError for a corpus that cannot be read.
    """
    frequencies = await asyncio.to_thread(document_frequencies, corpus_dir)
    searcher = _Searcher(engine, retmax, sort, retrier or Retrier())
    per_row = [baseline_queries(row.text, frequencies) for row in rows]
    recalls: dict[str, list[float]] = {}
    for name in ("original", "and_all", "or_all", *(f"rarest_{k}" for k in RAREST_K)):
        recalls[name] = await searcher.recalls([queries[name] for queries in per_row], rows)
    return recalls


class _Searcher:
    """Recall of many queries, a bounded number at a time, equal ones asked once."""

    def __init__(self, engine: SearchEngine, retmax: int, sort: str, retrier: Retrier) -> None:
        self._engine = engine
        self._retmax = retmax
        self._sort = sort
        self._retrier = retrier
        self._cache = SearchCache()
        self._turns = asyncio.Semaphore(_CONCURRENCY)

    async def recalls(self, queries: Iterable[str], rows: Sequence[Row]) -> list[float]:
        tasks = [asyncio.ensure_future(self._recall(query, row)) for query, row in zip(queries, rows, strict=True)]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:  # the first failure ends the evaluation: ask nothing more
                task.cancel()

    async def _recall(self, query: str, row: Row) -> float:
        if not query.split():
            return 0.0
        request = SearchRequest(query, retmax=self._retmax, sort=self._sort, max_date=row.max_date)
        try:
            async with self._turns:
                result = await self._cache.search(
                    request, lambda wanted: self._retrier.run(lambda: self._engine.search(wanted))
                )
        except BadQuery:
            return 0.0
        return retrieval_metrics(result.ids, row.relevant, self._retmax)["recall"]
