"""vLLM's processes end with the actor, and the actor notices when they end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from actors.engine import EngineDiedError, EngineError, EngineOptions, GenerationRequest, vllm_problem
from actors.vllm_engine import VllmEngine
from tests.tiny_model import build_tiny_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(vllm_problem() is not None, reason=str(vllm_problem())),
]
OPTIONS = EngineOptions(max_model_len=512, max_sequences=8)
GONE_WITHIN_S = 10

ACTOR = """
import asyncio, sys
from pathlib import Path
from actors.engine import EngineOptions
from actors.vllm_engine import VllmEngine

async def main():
    engine = VllmEngine(EngineOptions(max_model_len=512, max_sequences=8, threads=int(sys.argv[2])))
    await engine.start(Path(sys.argv[1]), version=0)
    print("started", flush=True)
    await asyncio.sleep(300)

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model"))


def request(max_tokens: int = 400) -> GenerationRequest:
    return GenerationRequest("r", [1, 2, 3], 4, 1.0, 1.0, max_tokens, "never", 0)


def engine_processes(pid: int) -> list[psutil.Process]:
    """The descendants that are vLLM's; multiprocessing's resource tracker ends by itself."""
    return [
        child
        for child in psutil.Process(pid).children(recursive=True)
        if not any("resource_tracker" in part for part in child.cmdline())
    ]


@contextlib.asynccontextmanager
async def started(model_dir: Path) -> AsyncIterator[tuple[VllmEngine, list[psutil.Process]]]:
    engine = VllmEngine(OPTIONS)
    before = {process.pid for process in engine_processes(os.getpid())}
    await engine.start(model_dir, version=0)
    try:
        yield engine, [process for process in engine_processes(os.getpid()) if process.pid not in before]
    finally:
        await engine.close()


async def test_close_leaves_no_process_and_fails_what_runs(model_dir: Path) -> None:
    async with started(model_dir) as (engine, processes):
        assert processes
        running = asyncio.create_task(engine.generate(request()))
        await asyncio.sleep(0.1)
        begin = time.perf_counter()
        await engine.close()
        assert time.perf_counter() - begin < GONE_WITHIN_S
    assert not any(process.is_running() for process in processes)
    with pytest.raises(EngineDiedError, match="closed"):
        await running
    await engine.close()
    with pytest.raises(EngineDiedError):
        await engine.generate(request())


async def test_a_killed_engine_process_fails_every_call_at_once(model_dir: Path) -> None:
    async with started(model_dir) as (engine, processes):
        running = asyncio.create_task(engine.generate(request()))
        await asyncio.sleep(0.1)
        processes[0].kill()
        with pytest.raises(EngineDiedError, match=r"ended with exit code -9; restart this actor"):
            await asyncio.wait_for(running, timeout=GONE_WITHIN_S)
        with pytest.raises(EngineDiedError):
            await asyncio.wait_for(engine.load_weights(model_dir / "model.safetensors", 1), timeout=GONE_WITHIN_S)
        with pytest.raises(EngineDiedError):
            await asyncio.wait_for(engine.generate(request()), timeout=GONE_WITHIN_S)


async def test_ctrl_c_of_the_process_group_leaves_the_engine_to_the_actor(model_dir: Path) -> None:
    async with started(model_dir) as (engine, processes):
        for process in processes:
            process.send_signal(signal.SIGINT)
        completions = await engine.generate(request(max_tokens=8))
        assert len(completions) == 4


async def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"holds no \.safetensors file"):
        await VllmEngine(OPTIONS).start(tmp_path, version=0)


@pytest.mark.parametrize("threads", [1, 2], ids=["forked", "spawned"])
def test_the_engine_dies_with_a_killed_actor(model_dir: Path, threads: int) -> None:
    actor = subprocess.Popen(
        [sys.executable, "-c", ACTOR, str(model_dir), str(threads)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert actor.stdout is not None
        assert actor.stdout.readline() == "started\n"
        processes = engine_processes(actor.pid)
        assert processes
    finally:
        actor.kill()
        actor.wait()
    _, alive = psutil.wait_procs(processes, timeout=GONE_WITHIN_S)
    for process in alive:
        process.kill()
    assert not alive, f"orphans: {alive}"
