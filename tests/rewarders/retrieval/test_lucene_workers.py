"""What becomes of searches whose process dies."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from rewarders.engines.base import EngineUnavailable
from rewarders.servers.hosting import SearchServerError
from rewarders.servers.retrieval import lucene_process
from rewarders.servers.retrieval.backend import Query, Ranking, Refusal
from rewarders.servers.retrieval.lucene import LuceneBackend, LuceneSettings
from rewarders.servers.retrieval.lucene_process import LuceneProcess
from rewarders.servers.retrieval.lucene_wire import Answer
from tests.rewarders.retrieval.worlds import WORDS, texts, write_corpus

pytest.importorskip("pyserini", reason="the extra lucene is not installed")
BATCH = [Query(word, 5) for word in WORDS[:4]]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
async def backend(tmp_path: Path, cache: Path) -> AsyncIterator[LuceneBackend]:
    made = LuceneBackend(write_corpus(tmp_path, texts()), LuceneSettings(processes=2), cache)
    await made.start()
    yield made
    await made.close()


def lethal(monkeypatch: pytest.MonkeyPatch, poison: str, number: signal.Signals) -> list[int]:
    """From now on a process that is asked `poison` is ended first. Returns the sizes of the batches it was in."""
    real = LuceneProcess.answer
    sizes: list[int] = []

    async def answer(self: LuceneProcess, queries: Sequence[Query], deadline_s: float) -> tuple[Answer, ...]:
        if any(query.term == poison for query in queries):
            sizes.append(len(queries))
            os.kill(self.pid, number)
            await self._process.wait()
        return await real(self, queries, deadline_s)

    monkeypatch.setattr(LuceneProcess, "answer", answer)
    return sizes


async def test_a_batch_survives_its_process(backend: LuceneBackend) -> None:
    before = await backend.search(BATCH)
    assert len(backend.pids) == 2
    stopped = backend.pids[0]
    os.kill(stopped, signal.SIGSTOP)
    asking = asyncio.create_task(backend.search(BATCH))
    await asyncio.sleep(0.05)
    os.kill(stopped, signal.SIGKILL)
    assert await asking == before
    assert (backend.restarts, len(backend.pids)) == (1, 2)
    assert stopped not in backend.pids


async def test_a_query_that_ends_processes_is_refused_alone(
    backend: LuceneBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await backend.search(BATCH)
    sizes = lethal(monkeypatch, WORDS[0], signal.SIGABRT)
    refused, *others = await backend.search(BATCH)
    assert isinstance(refused, Refusal)
    assert "ended 2 search processes" in refused.reason
    assert others == before[1:]
    assert sizes[-2:] == [1, 1]
    assert all(isinstance(answer, Ranking) for answer in await backend.search(BATCH[1:]))


async def test_processes_ended_from_outside_are_no_bad_query(
    backend: LuceneBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    lethal(monkeypatch, WORDS[0], signal.SIGKILL)
    with pytest.raises(EngineUnavailable, match="SIGKILL"):
        await backend.search(BATCH)
    assert all(isinstance(answer, Ranking) for answer in await backend.search(BATCH[1:]))


async def test_a_process_that_does_not_answer_is_replaced(tmp_path: Path, cache: Path) -> None:
    settings = LuceneSettings(deadline_s=2.0)
    made = LuceneBackend(write_corpus(tmp_path, texts()), settings, cache)
    await made.start()
    try:
        os.kill(made.pids[0], signal.SIGSTOP)
        assert isinstance((await made.search(BATCH[:1]))[0], Ranking)
        assert made.restarts == 1
    finally:
        await made.close()
    assert made.pids == []
    with pytest.raises(EngineUnavailable, match="closed"):
        await made.search(BATCH)


async def test_without_java_the_start_says_what_to_do(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder without the packages stands for a host without the extra."""
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "jnius_config.py").write_text("raise ModuleNotFoundError('no jnius_config')")
    environment = lucene_process._environment()
    monkeypatch.setattr(
        lucene_process,
        "_environment",
        lambda: {**environment, "PYTHONPATH": f"{broken}{os.pathsep}{environment['PYTHONPATH']}"},
    )
    with pytest.raises(SearchServerError, match=r"pip install 'deepretrieval-async\[lucene\]'"):
        await LuceneBackend(write_corpus(tmp_path, texts()), LuceneSettings(), cache).start()
