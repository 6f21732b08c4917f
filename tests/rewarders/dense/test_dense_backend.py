"""The backend with its real process. Each start imports torch, so there are few."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from common.config.schema import DenseConfig
from common.data.beir import DataError
from rewarders.engines.base import EngineUnavailable
from rewarders.servers.hosting import SearchServerError
from rewarders.servers.retrieval.backend import Query, Ranking, Refusal
from rewarders.servers.retrieval.dense import DenseBackend, DenseSettings
from tests.rewarders.dense.tiny_bert import random_texts, write_corpus

DOCUMENTS = {f"d{number}": text for number, text in enumerate(random_texts(80, seed=3, longest=30))}


def test_settings_are_the_config_section() -> None:
    assert DenseSettings(**DenseConfig().model_dump()) == DenseSettings()


def test_the_light_end_imports_no_heavy_package() -> None:
    code = "import sys, rewarders.servers.retrieval.dense; print({'torch', 'faiss', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


async def test_it_answers_survives_its_process_and_says_what_is_wrong(tmp_path: Path) -> None:
    progress: list[tuple[int, int]] = []
    corpus = write_corpus(tmp_path / "corpus", DOCUMENTS)
    backend = DenseBackend(corpus, DenseSettings(), tmp_path / "cache", lambda *done: progress.append(done))
    with pytest.raises(SearchServerError, match="start it first"):
        _ = backend.size
    with pytest.raises(EngineUnavailable):
        await backend.search([Query("aspirin", 3)])
    await backend.start()
    try:
        assert progress[-1] == (80, 80)
        assert (backend.size, backend.encoded) == (80, 80)
        version = backend.version
        expected = await _answers(backend)
        await _a_cancelled_search_leaves_the_next_one_its_own_answer(backend)
        await _kill(backend)
        assert await _answers(backend) == expected
        assert (backend.version, backend.encoded) == (version, 0)
    finally:
        await backend.close()
    with pytest.raises(EngineUnavailable, match="not open"):
        await backend.search([Query("aspirin", 3)])


async def _answers(backend: DenseBackend) -> list[Ranking | Refusal]:
    queries = [Query("aspirin stroke", 5), Query(" ", 5), Query("\ud800", 5), Query("☃", 5), Query("sleep", 200)]
    best, empty, broken, unknown, everything = answers = await backend.search(queries)
    assert isinstance(best, Ranking)
    assert len(best.ids) == len(best.scores) == 5
    assert best.count == 80
    assert "aspirin" in DOCUMENTS[best.ids[0]] or "stroke" in DOCUMENTS[best.ids[0]]
    assert isinstance(empty, Refusal)
    assert isinstance(broken, Refusal)
    assert unknown == Ranking((), (), 0)
    assert isinstance(everything, Ranking)
    assert sorted(everything.ids) == sorted(DOCUMENTS)
    [feedback] = await backend.search([Query("aspirin", 5, rm3=True)])
    assert isinstance(feedback, Refusal)
    assert await backend.search([]) == []
    return answers


async def _a_cancelled_search_leaves_the_next_one_its_own_answer(backend: DenseBackend) -> None:
    first = asyncio.ensure_future(backend.search([Query("kidney", 80)] * 50))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    first.cancel()
    [alone] = await backend.search([Query("liver", 2)])
    assert isinstance(alone, Ranking)
    assert len(alone.ids) == 2
    assert "liver" in DOCUMENTS[alone.ids[0]]


async def _kill(backend: DenseBackend) -> None:
    """Under a search, which fails as unavailable or came through before."""
    assert backend._process is not None
    process = backend._process._process
    search = asyncio.ensure_future(backend.search([Query("gene", 80)] * 300))
    await asyncio.sleep(0)
    os.kill(process.pid, signal.SIGKILL)
    [outcome] = await asyncio.gather(search, return_exceptions=True)
    assert isinstance(outcome, list | EngineUnavailable), outcome
    await process.wait()


async def test_errors_of_the_process_are_one_line_of_the_backend(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", DOCUMENTS)
    with pytest.raises(SearchServerError, match="no such folder"):
        await DenseBackend(corpus, DenseSettings(encoder="/no/such/encoder"), tmp_path).start()
    with pytest.raises(DataError, match=r"corpus\.jsonl"):
        await DenseBackend(tmp_path / "nowhere", DenseSettings(), tmp_path).start()


async def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "faiss.py").write_text("raise ModuleNotFoundError(\"No module named 'faiss'\", name='faiss')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    corpus = write_corpus(tmp_path / "corpus", DOCUMENTS)
    with pytest.raises(SearchServerError, match=r"faiss.*pip install") as raised:
        await DenseBackend(corpus, DenseSettings(), tmp_path).start()
    assert "\n" not in str(raised.value)


async def test_a_process_that_ends_by_itself_leaves_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "faiss.py").write_text("import sys\nprint('noise')\nsys.exit('the driver is broken')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    with pytest.raises(SearchServerError, match="the driver is broken"):
        await DenseBackend(write_corpus(tmp_path / "corpus", DOCUMENTS), DenseSettings(), tmp_path).start()
