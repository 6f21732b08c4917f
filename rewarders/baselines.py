"""Fixed rewrites that a trained policy has to beat, measured by the task's own metric through the same engine.

* "original": the request as it is (Boolean engines join its words by an implicit AND);
* "and_all", "or_all": AND, OR of all its words;
* "rarest_1" … "rarest_5": AND of its k rarest words. These know the document frequencies of the corpus,
  which the policy never sees.

An engine that takes a query as a bag of words or by its meaning gets "original" and "rarest_1_words" …
"rarest_5_words": the k rarest words, one after the other.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, Literal

from common.data.beir import CORPUS_FILE, read_corpus
from common.tasks import ParsedAnswer, Row
from rewarders.answerers.search import SearchAnswerer
from rewarders.engines.base import BadQuery
from rewarders.servers.text import search_words

QueryForm = Literal["boolean", "words"]

RAREST_K: Final = (1, 2, 3, 4, 5)
LARGEST_CORPUS: Final = 2 << 30  # bytes; the words of a larger one are not counted, that takes hours and much memory
_CONCURRENCY: Final = 16
_PICO_LINE: Final = re.compile(r"^[ \t]*[PICO][ \t]*:(.+)$", re.MULTILINE)


def document_frequencies(corpus_dir: str | Path) -> Counter[str]:
    """Number of documents of a BEIR folder that hold each word, in title or text. Raises DataError as
    `read_corpus`.
    """
    frequencies: Counter[str] = Counter()
    for document in read_corpus(corpus_dir):
        frequencies.update(set(search_words(f"{document.title} {document.text}")))
    return frequencies


def known_frequencies(corpus_dir: str | Path) -> Counter[str] | None:
    """As `document_frequencies`; None where there is no corpus to count, or one too large for it."""
    corpus = Path(corpus_dir) / CORPUS_FILE
    countable = corpus.is_file() and corpus.stat().st_size <= LARGEST_CORPUS
    return document_frequencies(corpus_dir) if countable else None


def pico_query(text: str) -> str | None:
    """OR of the PICO elements of a request, each the AND of its words; None where the request is not given by them.

    An element is a line `P: …`, `I: …`, `C: …` or `O: …` with something after the colon.
    """
    elements = [" AND ".join(dict.fromkeys(search_words(element))) for element in _PICO_LINE.findall(text)]
    found = [f"({element})" for element in elements if element]
    return " OR ".join(found) if len(found) > 1 else None


def baseline_queries(text: str, frequencies: Mapping[str, int] | None, form: QueryForm = "boolean") -> dict[str, str]:
    """The query of each baseline for one request; with fewer than k words, "rarest_k" takes them all.

    A word the corpus does not hold cannot be found, so it counts as no word for "rarest_k"; ties go to
    the earlier word. A request without a word gets itself everywhere.

    frequencies: of the corpus, None where they are not known: no rarest words then. form: what the engine
    understands.
    """
    words = list(dict.fromkeys(search_words(text)))
    queries = {"original": text}
    if form == "boolean":
        queries |= {"and_all": " AND ".join(words), "or_all": " OR ".join(words)}
    if frequencies is not None:
        known = sorted((word for word in words if frequencies.get(word, 0) > 0), key=lambda word: frequencies[word])
        joiner, ending = (" AND ", "") if form == "boolean" else (" ", "_words")
        queries |= {f"rarest_{k}{ending}": joiner.join(known[:k] or words) for k in RAREST_K}
    return {name: query or text for name, query in queries.items()}


def best_rarest(measured: Mapping[str, Sequence[float]]) -> str:
    """Name of the "rarest_k" baseline with the highest mean; the smaller k wins a tie."""
    return max((name for name in measured if name.startswith("rarest_")), key=lambda name: sum(measured[name]))


async def evaluate_baselines(
    rows: Sequence[Row], answerer: SearchAnswerer, corpus_dir: str | Path, form: QueryForm = "boolean"
) -> dict[str, list[float]]:
    """The task's metric of every baseline on every row: name -> one value per row, in order.

    A query the engine refuses finds nothing, and scores 0. Raises EngineUnavailable if the engine cannot be
    asked, after retries (never an invented 0), and DataError for a corpus that cannot be read.

    answerer: started; its task says what is measured.
    """
    frequencies = await asyncio.to_thread(known_frequencies, corpus_dir)
    judge = _Judge(answerer)
    per_row = [baseline_queries(row.text, frequencies, form) for row in rows]
    names = list(per_row[0]) if per_row else []
    return {name: await judge.values([queries[name] for queries in per_row], rows) for name in names}


class _Judge:
    """The task's metric of many queries, a bounded number at a time."""

    def __init__(self, answerer: SearchAnswerer) -> None:
        self._answerer = answerer
        self._turns = asyncio.Semaphore(_CONCURRENCY)

    async def values(self, queries: Iterable[str], rows: Sequence[Row]) -> list[float]:
        tasks = [asyncio.ensure_future(self._value(query, row)) for query, row in zip(queries, rows, strict=True)]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:  # the first failure ends the evaluation: ask nothing more
                task.cancel()

    async def _value(self, query: str, row: Row) -> float:
        if not query.split():
            return 0.0
        task, answer = self._answerer.task, ParsedAnswer("", query)
        try:
            async with self._turns:
                outcome = await self._answerer.outcome(answer, row)
        except BadQuery:
            return 0.0
        return task.score(row, answer, outcome).metrics.get(task.metric, 0.0)
