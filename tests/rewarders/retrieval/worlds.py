"""A generated corpus whose every word the analyzer leaves as it is, and a backend that tests of one module share."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from rewarders.engines.base import EngineUnavailable
from rewarders.servers.retrieval.backend import Backend, Query, Ranking, Refusal

WORDS = ("alpha", "beta", "gamma", "delta", "omega", "kappa", "sigma", "betatron", "gammarus", "alphanum")
STOPWORD = "the"
DOCUMENTS = 90

# Runs a coroutine on the loop of another thread and gives its result.
Run = Callable[[Coroutine[Any, Any, Any]], Any]


def texts(seed: int = 0) -> dict[str, tuple[str, str]]:
    """id -> (title, text), at most 30 words together: so long a length is kept exactly in Lucene's one byte."""
    chance = random.Random(seed)
    vocabulary = [word for place, word in enumerate(WORDS) for _ in range(len(WORDS) - place)] + [STOPWORD] * 6
    made = {}
    for number in range(DOCUMENTS):
        title, text = (
            " ".join(chance.choices(vocabulary, k=chance.randint(low, high))) for low, high in ((0, 4), (1, 26))
        )
        # Ids whose order as bytes is neither that of the file nor that of numbers; some documents are equal.
        made[f"d{(number * 37) % DOCUMENTS}é" if number % 7 == 0 else f"d{(number * 37) % DOCUMENTS}"] = (title, text)
        if number % 9 == 0:
            made[f"copy-{number}"] = (title, text)
    return made


def topical_texts(seed: int = 0, topics: int = 40) -> dict[str, tuple[str, str]]:
    """id -> (title, text): rare words that go together by topic, and what RM3 feeds back none of: words that are in
    most documents, in other alphabets, of one letter or of too many."""
    chance = random.Random(seed)
    made = {}
    for number in range(6 * topics):
        topic = number % topics
        rare = [f"t{topic}w{chance.randint(0, 9)}" for _ in range(chance.randint(2, 20))]
        unusable = chance.choices(["common", "the", "é" * 3, "q", f"x{topic}" + "y" * 20], k=6)
        words = [*rare, *unusable, f"t{(topic + 1) % topics}w0"]
        chance.shuffle(words)
        made[f"n{number:03}"] = ("" if number % 5 == 0 else words[0], " ".join(words[1:]))
    made["empty"] = ("", "é é")
    return made


def write_corpus(folder: Path, documents: dict[str, tuple[str, str]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"_id": key, "title": title, "text": text}) for key, (title, text) in documents.items()]
    (folder / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    return folder


class WordIndex(Backend):
    """Finds the documents that hold every word of the query, by id. It can be held up, and told to be down."""

    kind: ClassVar[str] = "words"

    def __init__(self, documents: dict[str, tuple[str, str]]) -> None:
        self._words = {key: set(f"{title} {text}".split()) for key, (title, text) in documents.items()}
        self.batches: list[int] = []
        self.free = asyncio.Event()
        self.free.set()
        self.down = self.closed = False
        self.batch = 16

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        self.closed = True

    @property
    def size(self) -> int:
        return len(self._words)

    @property
    def version(self) -> str:
        return "words-1"

    async def search(self, queries: Sequence[Query]) -> list[Ranking | Refusal]:
        self.batches.append(len(queries))
        await self.free.wait()
        if self.down:
            raise EngineUnavailable("the index is down")
        return [Refusal("a bad word") if query.term == "bad" else self._find(query) for query in queries]

    def _find(self, query: Query) -> Ranking:
        if query.term == "ghost":
            return Ranking(("nobody",), (1.0,), 1)
        found = sorted(key for key, words in self._words.items() if words.issuperset(query.term.split()))
        return Ranking(tuple(found[: query.k]), (1.0,) * len(found[: query.k]), len(found))


class SharedBackend:
    """A started backend on an event loop in a thread, for tests that have none or many."""

    def __init__(self, backend: Backend, run: Run) -> None:
        self.backend = backend
        self.run = run

    def search(self, terms: Sequence[str], k: int = 10, rm3: bool = False) -> list[Ranking | Refusal]:
        found: list[Ranking | Refusal] = self.run(self.backend.search([Query(term, k, rm3) for term in terms]))
        return found


@contextmanager
def shared(backend: Backend) -> Iterator[SharedBackend]:
    with loop_in_a_thread() as run:
        try:
            run(backend.start())
            yield SharedBackend(backend, run)
        finally:
            run(backend.close())


@contextmanager
def loop_in_a_thread() -> Iterator[Run]:
    """Gives what runs a coroutine there and waits for its result."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield lambda work: asyncio.run_coroutine_threadsafe(work, loop).result(timeout=300)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
