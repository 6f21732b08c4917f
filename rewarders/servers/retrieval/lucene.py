"""BM25 by Lucene, as pyserini brings it, in JVM processes of their own.

A process that dies is replaced and what it was asked is asked again, in halves, so that one query that ends processes
takes no other with it; that one is refused.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final, Literal

from rewarders.engines.base import EngineUnavailable
from rewarders.engines.retrieval_wire import MAX_TERM_CHARACTERS
from rewarders.servers.hosting import SearchServerError
from rewarders.servers.index_cache import Progress, default_cache_folder, unfinished_folder
from rewarders.servers.retrieval.backend import Backend, Query, Ranking, Refusal
from rewarders.servers.retrieval.documents import DocumentStore
from rewarders.servers.retrieval.lucene_index import ANALYZER_VERSION
from rewarders.servers.retrieval.lucene_process import LuceneProcess, WorkerDied
from rewarders.servers.retrieval.lucene_wire import Answer, Build, Failed, Open, Refused

INDEX_FORMAT: Final = 1
QUERIES_PER_THREAD: Final = 64
# Times that one query may lose its process before it counts as the query's fault (or, if somebody outside ends the
# processes, as an outage).
_DEATHS_TO_BLAME: Final = 2


@dataclass(frozen=True, slots=True)
class LuceneSettings:
    """How to search.

    Args:
        k1, b: of BM25; they belong to the search, so one index serves all.
        syntax: a bag of words, or the language of `boolean_query`.
        processes, threads: JVMs, and threads in each.
        deadline_s: seconds for one batch; a process that needs longer is replaced.
        exact_up_to: documents up to which `count` is exact. Above, matches are counted up to the ids wanted or 1,000,
            whichever is more, and `count` may be too small: Lucene then skips what cannot be among the best.
    """

    k1: float = 0.9
    b: float = 0.4
    syntax: Literal["words", "boolean"] = "words"
    processes: int = 1
    threads: int = 1
    deadline_s: float = 60.0
    exact_up_to: int = 2_000_000

    def __post_init__(self) -> None:
        if self.k1 < 0 or not 0 <= self.b <= 1:
            raise SearchServerError(f"k1 must not be negative and b 0 to 1, got {self.k1:g} and {self.b:g}")
        if self.processes < 1 or self.threads < 1:
            raise SearchServerError("BM25 needs at least one process with one thread")


class LuceneBackend(Backend):
    """Searches a BEIR folder.

    Args:
        cache_folder: where the index is kept; None for the user's cache folder.
        progress: called with (documents done, documents in all) while an index is built.
    """

    kind: ClassVar[str] = "bm25"

    def __init__(
        self,
        corpus: Path,
        settings: LuceneSettings | None = None,
        cache_folder: Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.settings = settings or LuceneSettings()
        self.batch = QUERIES_PER_THREAD * self.settings.processes * self.settings.threads
        self.restarts = 0
        self._corpus = corpus
        self._cache_folder = cache_folder or default_cache_folder("retrieval")
        self._progress = progress or (lambda done, total: None)
        self._workers: list[LuceneProcess | None] = [None] * self.settings.processes
        self._open: Open | None = None
        self._size = 0
        self._digest = ""
        self._store = ""

    @property
    def size(self) -> int:
        return self._size

    @property
    def version(self) -> str:
        used = self.settings
        exact = "" if self._size <= used.exact_up_to else "-estimated"
        return f"bm25-{self._digest[:16]}-{ANALYZER_VERSION}-k1={used.k1:g}-b={used.b:g}-{used.syntax}{exact}"

    @property
    def pids(self) -> list[int]:
        """Process ids of the JVMs that live."""
        return [worker.pid for worker in self._workers if worker is not None and worker.alive]

    async def start(self) -> None:
        try:
            folder = await self._ensure_index()
            used = self.settings
            boolean = used.syntax == "boolean"
            bm25 = (used.k1, used.b, boolean)
            self._open = Open(str(folder), self._store, self._digest, *bm25, used.threads, used.exact_up_to)
            outcomes = await asyncio.gather(*map(self._fill, range(used.processes)), return_exceptions=True)
            for outcome in outcomes:
                if isinstance(outcome, BaseException):
                    raise outcome
        except WorkerDied as died:
            await self.close()
            raise SearchServerError(died.reason) from None
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        self._open = None
        workers, self._workers = self._workers, [None] * len(self._workers)
        await asyncio.gather(*(worker.reap() for worker in workers if worker is not None))

    async def search(self, queries: Sequence[Query]) -> list[Ranking | Refusal]:
        """Every process takes each n-th query. Raises EngineUnavailable."""
        answers: list[Ranking | Refusal | None] = list(map(_problem, queries))
        left = [place for place, answer in enumerate(answers) if answer is None]
        shares = [share for first in range(len(self._workers)) if (share := left[first :: len(self._workers)])]
        outcomes = await asyncio.gather(
            *(self._share(number, [queries[place] for place in share]) for number, share in enumerate(shares)),
            return_exceptions=True,  # all come to an end before this call does
        )
        for share, outcome in zip(shares, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                raise outcome
            for place, answer in zip(share, outcome, strict=True):
                answers[place] = _result(answer)
        return [answer for answer in answers if answer is not None]

    async def _share(self, number: int, queries: list[Query]) -> list[Answer]:
        try:
            return list(await self._ask(number, queries))
        except WorkerDied as died:
            last = died
        if len(queries) > 1:
            half = len(queries) // 2
            return [*await self._share(number, queries[:half]), *await self._share(number, queries[half:])]
        for _ in range(_DEATHS_TO_BLAME - 1):
            try:
                return list(await self._ask(number, queries))
            except WorkerDied as died:
                last = died
        if not last.by_itself:
            raise EngineUnavailable(last.reason)
        return [Refused(f"the query ended {_DEATHS_TO_BLAME} search processes: {last.reason}")]

    async def _ask(self, number: int, queries: Sequence[Query]) -> tuple[Answer, ...]:
        """Ask one process; a dead one is replaced first."""
        worker = self._workers[number]
        if worker is None or not worker.alive:
            try:
                worker = await self._fill(number)
            except WorkerDied as died:
                raise EngineUnavailable(f"a BM25 worker cannot be started again: {died.reason}") from None
            self.restarts += 1
        try:
            return await worker.answer(queries, self.settings.deadline_s)
        except BaseException:  # cancelled too: its answer would be taken for that to the next batch
            self._workers[number] = None
            await worker.reap()
            raise

    async def _fill(self, number: int) -> LuceneProcess:
        if self._open is None:
            raise EngineUnavailable("the BM25 index is closed")
        worker = await LuceneProcess.open(self._open)
        self._workers[number] = worker
        self._size = worker.opened.documents
        return worker

    async def _ensure_index(self) -> Path:
        """The folder of the index, which is built if no index of the same content is in the cache."""
        store = await asyncio.to_thread(DocumentStore.of_corpus, self._corpus, self._cache_folder, self._progress)
        store.close()
        self._digest = store.digest
        self._store = os.fspath(store.path.resolve())
        folder = self._cache_folder / f"{store.digest[:32]}-{ANALYZER_VERSION}-v{INDEX_FORMAT}"
        if not folder.is_dir():
            with unfinished_folder(folder) as unfinished:
                order = Build(self._store, store.digest, os.fspath(unfinished.resolve()))
                await LuceneProcess.build(order, self._progress)
        return folder.resolve()


def _problem(query: Query) -> Refusal | None:
    """Why no process should be asked."""
    if len(query.term) > MAX_TERM_CHARACTERS:
        return Refusal(f"the query is longer than {MAX_TERM_CHARACTERS:,} characters")
    try:
        query.term.encode()
    except UnicodeEncodeError:
        return Refusal("the query is not valid Unicode text")
    return None


def _result(answer: Answer) -> Ranking | Refusal:
    if isinstance(answer, Failed):
        raise EngineUnavailable(f"Lucene failed: {answer.reason}")
    if isinstance(answer, Refused):
        return Refusal(answer.reason)
    return Ranking(answer.ids, answer.scores, answer.count)
