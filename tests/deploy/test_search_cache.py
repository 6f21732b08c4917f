"""What a configuration makes of the cache: where results are kept, under which source, and who is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common.config import Config
from common.config.schema import QuotaConfig
from common.run_folder import RunFolder
from common.tasks.from_config import task_of
from deploy.engines import answerer_of, engine_of
from deploy.errors import LaunchError, exit_status, user_message
from deploy.run_setup import prepare_folder
from deploy.search_cache import cache_settled, search_cache_of, source_of
from rewarders.cache.recording import RecordingEngine, RecordingError, ReplayEngine
from rewarders.engines.base import SearchRequest, SearchResult
from rewarders.engines.pubmed import PubMedEngine

NCBI = "https://eutils.ncbi.nlm.nih.gov"


def config(tmp_path: Path, url: str | None = NCBI, **cache: Any) -> Config:
    (tmp_path / "corpus").mkdir(exist_ok=True)
    (tmp_path / "corpus" / "corpus.jsonl").write_text('{"_id": "1", "text": "heart"}\n')
    sections = {
        "run": {"name": "demo", "root": str(tmp_path)},
        "data": {"corpus": str(tmp_path / "corpus")},
        "search": {"url": url, "cache": cache},
    }
    return Config.model_validate(sections)


def settled(tmp_path: Path, url: str | None = NCBI, **cache: Any) -> Config:
    """As the launcher leaves it, with another port in every run."""
    given = config(tmp_path, url, **cache)
    folder = RunFolder(tmp_path / "demo")
    section = cache_settled(given, folder)
    search = given.search.model_copy(update={"cache": section, "url": url or "http://127.0.0.1:4321"})
    return given.model_copy(update={"search": search})


def test_results_lie_in_the_runs_folder_where_no_other_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLACE", str(tmp_path))
    assert settled(tmp_path).search.cache.folder is None
    for mode in ("disk", "record", "replay"):
        assert settled(tmp_path, mode=mode).search.cache.folder == str(tmp_path / "demo" / "searches")
        named = settled(tmp_path, mode=mode, folder="$PLACE/elsewhere").search.cache.folder
        assert named == str(tmp_path / "elsewhere"), "roles may have other working folders"


def test_a_local_server_is_known_by_its_corpus_and_not_by_its_port(tmp_path: Path) -> None:
    first = source_of(settled(tmp_path, None, mode="disk"))
    assert "4321" not in first
    assert source_of(settled(tmp_path, None, mode="disk")) == first
    (tmp_path / "other").mkdir()
    changed = config(tmp_path / "other", None, mode="disk")
    (tmp_path / "other" / "corpus" / "corpus.jsonl").write_text('{"_id": "1", "text": "lung"}\n')
    assert cache_settled(changed, RunFolder(tmp_path)).source != first.removeprefix("pubmed ")
    assert source_of(settled(tmp_path, f"{NCBI}/")) == f"pubmed {NCBI}"
    assert source_of(settled(tmp_path, "http://me:secret@host:1/x")) == "pubmed http://host:1/x"


def test_a_server_of_this_machine_must_be_named_before_its_results_are_kept(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"name what it serves as search\.cache\.source"):
        settled(tmp_path, "http://localhost:8900", mode="disk")
    assert source_of(settled(tmp_path, "http://localhost:8900", mode="disk", source="mine")) == "pubmed mine"


async def test_every_mode_asks_who_it_should(tmp_path: Path) -> None:
    assert isinstance(engine_of(settled(tmp_path)), PubMedEngine)
    assert isinstance(engine_of(settled(tmp_path, mode="disk")), PubMedEngine)
    assert isinstance(engine_of(settled(tmp_path, mode="record")), RecordingEngine)
    assert isinstance(engine_of(settled(tmp_path, mode="replay")), ReplayEngine)
    replay = settled(tmp_path, mode="replay")
    with pytest.raises(RecordingError) as caught:
        await answerer_of(replay, task_of(replay)).start()
    assert exit_status(caught.value) != 1, "every rewarder would end in the same way"
    message = user_message(caught.value)
    assert message is not None
    assert "search.cache.mode=record" in message


async def test_results_are_shared_where_a_quota_makes_it_worth_while_or_it_is_wanted(tmp_path: Path) -> None:
    class Fleet:
        def __init__(self) -> None:
            self.asked = 0

        async def get(self, key: bytes) -> bytes | None:
            self.asked += 1
            return None

        def put(self, key: bytes, payload: bytes) -> None:
            pass

        def failed(self, key: bytes) -> None:
            pass

    async def fetch(_: SearchRequest) -> SearchResult:
        return SearchResult((), 0)

    async def shares(quota: bool, **cache: Any) -> bool:
        fleet, given = Fleet(), settled(tmp_path, **cache)
        search = given.search.model_copy(update={"quota": QuotaConfig() if quota else None})
        given = given.model_copy(update={"search": search})
        await search_cache_of(given, fleet).search(SearchRequest("heart", 1), fetch)
        return fleet.asked == 1

    assert await shares(quota=True)
    assert await shares(quota=True, mode="record")
    assert await shares(quota=False, share=True)
    assert not await shares(quota=False)
    assert not await shares(quota=True, share=False)
    assert not await shares(quota=True, mode="replay"), "the recording has all there is"


async def test_disk_results_serve_the_next_run(tmp_path: Path) -> None:
    async def fetch(_: SearchRequest) -> SearchResult:
        return SearchResult(("1",), 1)

    for expected in (0, 1):
        cache = search_cache_of(settled(tmp_path, None, mode="disk", folder=str(tmp_path / "kept")))
        await cache.start()
        await cache.search(SearchRequest("heart", 1), fetch)
        await cache.close()
        assert cache.stats.disk == expected


def test_a_new_recording_sets_the_earlier_one_aside_and_a_replay_does_not(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "demo")
    folder.searches.mkdir(parents=True)
    (folder.searches / "host.sqlite").write_text("first")
    prepare_folder(folder, config(tmp_path, mode="replay"), resume=False)
    prepare_folder(folder, config(tmp_path, mode="record"), resume=True)
    assert (folder.searches / "host.sqlite").read_text() == "first"
    prepare_folder(folder, config(tmp_path, mode="record"), resume=False)
    assert not folder.searches.exists()
    assert (folder.path / "previous" / "searches" / "host.sqlite").read_text() == "first"
