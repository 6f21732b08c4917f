"""Several API keys: each is asked under a quota of its own."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from common.broker.service import BrokerSettings
from common.transport.keys import create_run_keys
from rewarders.engines.base import SearchRequest
from rewarders.engines.pubmed import PubMedEngine, PubMedSettings
from rewarders.servers.pubmed import ServerSettings, serve
from tests.common.broker_world import RunningBroker, peer
from tests.rewarders.fake_ncbi import FakeNcbi
from tests.rewarders.fake_upstream import running

PER_KEY, WINDOW_S, SEARCHES = 3, 0.4, 30
MORE_KEYS = ("SECOND_KEY", "THIRD_KEY")


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NCBI_API_KEY", *MORE_KEYS):
        monkeypatch.setenv(name, f"value-of-{name}")


async def search_often(url: str, folder: Path) -> None:
    """`SEARCHES` searches at once under a broker's quota of `PER_KEY` requests for each key."""
    create_run_keys(folder / "keys")
    quota = (PER_KEY * (1 + len(MORE_KEYS)), WINDOW_S, 1.0)
    broker = RunningBroker(folder / "keys", BrokerSettings(1, heartbeat_s=0.1, quota=quota))
    settings = PubMedSettings(base_url=url, more_api_keys_env=MORE_KEYS)
    try:
        async with (
            peer(broker.endpoint, folder / "keys", "rewarder") as client,
            PubMedEngine(settings, permit=client.quota_slot) as engine,
        ):
            searches = (engine.search(SearchRequest(f"word{number}", retmax=1)) for number in range(SEARCHES))
            await asyncio.gather(*searches)
    finally:
        await asyncio.to_thread(broker.stop)


async def test_every_key_is_used_alike(tmp_path: Path) -> None:
    async with running(FakeNcbi()) as ncbi:
        await search_often(ncbi.url, tmp_path)
    used = Counter(form["api_key"] for form in ncbi.received)
    assert set(used) == {"value-of-NCBI_API_KEY", "value-of-SECOND_KEY", "value-of-THIRD_KEY"}
    assert sum(used.values()) == SEARCHES
    assert min(used.values()) >= PER_KEY


async def test_no_key_is_asked_for_more_than_its_quota(tmp_path: Path) -> None:
    """A server that refuses whatever exceeds the quota of one key: a refusal would fail its search."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "corpus.jsonl").write_text('{"_id": "1", "title": "word1", "text": "word2"}\n')
    served = ServerSettings(corpus=corpus, cache_folder=tmp_path, quota=PER_KEY, window_s=WINDOW_S)
    async with await serve(served) as server:
        await search_often(server.base_url, tmp_path)
