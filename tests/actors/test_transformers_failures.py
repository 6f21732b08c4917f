"""The transformers engine's thread never leaves a caller waiting."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from actors.engine import EngineDiedError, EngineError, EngineOptions, GenerationRequest
from actors.transformers_engine import TransformersEngine
from tests.tiny_model import build_tiny_model

REQUEST = GenerationRequest("r", [1, 2, 3], 2, 1.0, 1.0, 400, "never", 0)


def engine_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "transformers-engine"]


@pytest_asyncio.fixture
async def engine(tmp_path: Path) -> AsyncIterator[TransformersEngine]:
    engine = TransformersEngine(EngineOptions(max_model_len=512, max_sequences=2))
    await engine.start(build_tiny_model(tmp_path / "model"), version=0)
    yield engine
    await engine.close()
    assert not engine_threads()


async def test_close_fails_what_runs_and_what_waits(engine: TransformersEngine) -> None:
    calls = [asyncio.create_task(engine.generate(REQUEST)) for _ in range(3)]
    await asyncio.sleep(0.1)
    await engine.close()
    results = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), timeout=10)
    assert all(isinstance(result, EngineDiedError) for result in results)
    with pytest.raises(EngineDiedError, match="closed"):
        await asyncio.wait_for(engine.generate(REQUEST), timeout=10)


async def test_an_error_inside_fails_every_caller(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    assert engine._generator is not None
    monkeypatch.setattr(engine._generator._model, "generate", out_of_memory)
    for _ in range(2):
        with pytest.raises(EngineDiedError, match=r"out of memory.*restart this actor"):
            await asyncio.wait_for(engine.generate(REQUEST), timeout=10)


async def test_a_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "model")
    (folder / "config.json").write_text('{"model_type": "unheard-of"}')
    engine = TransformersEngine(EngineOptions())
    with pytest.raises(EngineError, match="transformers could not load"):
        await engine.start(folder, version=0)
    await engine.close()
