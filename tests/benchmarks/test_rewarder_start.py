"""A rewarder's process stays light."""

from __future__ import annotations

from pathlib import Path

import pytest
from common.data.demo_world import build_demo_world

from benchmarks.rewarder_fleet import RewarderFleet
from benchmarks.rewarder_start import heavy_imports
from benchmarks.search_process import SearchProcess
from common.data.rows import read_requests
from rewarders.servers.traffic import ServerSettings

FORBIDDEN = {"torch", "vllm", "faiss", "transformers", "tokenizers", "jnius", "pyserini"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    return build_demo_world(folder / "world", documents=200, train_requests=20, test_requests=5)


async def test_a_rewarder_that_has_scored_a_group_has_imported_nothing_heavy(world: Path, tmp_path: Path) -> None:
    with SearchProcess("pubmed", ServerSettings(corpus=world, cache_folder=tmp_path)) as server:
        settings = [f"search.url={server.base_url}", "task.reasoning=false", "search.retmax=50"]
        async with RewarderFleet(tmp_path / "run", settings) as fleet:
            heavy = await heavy_imports(fleet, read_requests(world, "train"), 0)
    assert FORBIDDEN.isdisjoint(heavy), heavy
