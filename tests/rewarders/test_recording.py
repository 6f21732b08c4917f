"""A recorded run repeats exactly and contacts nobody; what it does not hold ends the replay by name."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from pathlib import Path

import pytest

from common.scores import InvalidOutput, Score, Scored
from common.tasks import Row
from common.tasks.publication_search import PublicationSearch
from rewarders.cache.recording import RecordingEngine, RecordingError, ReplayEngine, ReplayMiss
from rewarders.cache.table import SearchTable
from rewarders.engines.base import BadQuery, EngineUnavailable, SearchEngine, SearchRequest, SearchResult
from rewarders.engines.pubmed import PubMedEngine, PubMedSettings
from rewarders.retry import Retrier, RetryPolicy
from rewarders.servers.pubmed import ServerSettings, serve
from tests.rewarders.search_scorer import search_scorer

QUERIES = ["aspirin AND stroke", "statins", "aspirin AND (", "trial", "unicorns", "aspirin OR statins", "  trial "]
TEXTS = [f'<think>hm</think><answer>{{"query": "{query}"}}</answer>' for query in QUERIES] + ["no answer"]
ROW = Row("q1", "does aspirin help", ("1", "2", "3", "4"))


class DatedEngine(SearchEngine):
    """An engine whose data changes with every search, and that can be told to be down."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.down = False

    async def check(self) -> None:
        pass

    async def data_version(self) -> str:
        return f"day {len(self.asked)}"

    async def search(self, request: SearchRequest) -> SearchResult:
        if self.down:
            raise EngineUnavailable("HTTP 503")
        self.asked.append(request.term)
        await asyncio.sleep(0)
        if "(" in request.term:
            raise BadQuery(f"unbalanced, asked {len(self.asked)} times")
        return SearchResult((f"{request.term} {len(self.asked)}",), 1)


def request(term: str) -> SearchRequest:
    return SearchRequest(term, retmax=10)


async def scored(engine: SearchEngine) -> list[Score]:
    retrier = Retrier(RetryPolicy(attempts=10, base_s=0.01, budget_burst=100.0))
    scorer = search_scorer(PublicationSearch(top_k=50), engine, retrier=retrier)
    async with scorer.answerer:
        return await scorer.score_group(TEXTS, ROW)


async def test_scoring_is_repeated_exactly_without_the_server(tmp_path: Path) -> None:
    documents = [{"_id": str(n), "title": "Aspirin", "text": f"trial {n} of stroke"} for n in range(1, 5)]
    documents += [{"_id": "9", "title": "Statins", "text": "a trial of cancer"}]
    (tmp_path / "corpus.jsonl").write_text("\n".join(json.dumps(document) for document in documents))
    local = ServerSettings(corpus=tmp_path, cache_folder=tmp_path / "index", fault_rate=0.3, fault_late_s=0.2)
    async with await serve(local) as server:
        settings = PubMedSettings(base_url=server.base_url, api_key_env=None, timeout_s=5.0)
        recorded = await scored(RecordingEngine(PubMedEngine(settings), tmp_path / "searches", "pubmed"))
    replayed = await scored(ReplayEngine(tmp_path / "searches", "pubmed"))
    assert replayed == recorded
    kinds = [type(score) for score in recorded]
    assert kinds == [Scored, Scored, InvalidOutput, Scored, Scored, Scored, Scored, InvalidOutput]
    assert isinstance(recorded[2], InvalidOutput)
    assert recorded[2].reason == "refused_query"
    assert recorded[2].detail


async def test_a_miss_is_an_error_that_names_the_query(tmp_path: Path) -> None:
    async with RecordingEngine(DatedEngine(), tmp_path, "ctgov") as engine:
        await engine.search(request("heart"))
    retrier = Retrier(RetryPolicy(attempts=5, base_s=0.0))
    scorer = search_scorer(PublicationSearch(top_k=10), ReplayEngine(tmp_path, "ctgov"), retrier=retrier)
    async with scorer.answerer:
        texts = ['<think></think><answer>{"query": "heart"}</answer>', TEXTS[1]]
        assert isinstance(await scorer.score_text(texts[0], ROW), Scored)
        with pytest.raises(ReplayMiss) as caught:
            await scorer.score_group(texts, ROW)
    assert "'statins' (retmax 10, sort pub_date)" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert retrier.retries == 0, "no waiting mends it"


async def test_a_query_has_one_answer_in_a_run_whatever_the_engine_says_later(tmp_path: Path) -> None:
    upstream = DatedEngine()
    async with RecordingEngine(upstream, tmp_path, "ctgov") as engine:
        first = await engine.search(request("heart"))
        await engine.search(request("lung"))
        assert await engine.search(request("heart")) == first
    async with RecordingEngine(upstream, tmp_path, "ctgov") as engine:  # after --resume
        assert await engine.search(request(" heart ")) == first
        with pytest.raises(BadQuery) as refused:
            await engine.search(request("(heart"))
    assert upstream.asked == ["heart", "lung", "(heart"]
    async with ReplayEngine(tmp_path, "ctgov") as replay:
        assert await replay.search(request("heart")) == first
        with pytest.raises(BadQuery, match=refused.value.reason):
            await replay.search(request("(heart"))
        assert await replay.data_version() == "day 1", "the version is the recording's"


async def test_outages_are_not_recorded(tmp_path: Path) -> None:
    upstream = DatedEngine()
    upstream.down = True
    async with RecordingEngine(upstream, tmp_path, "pubmed") as engine:
        with pytest.raises(EngineUnavailable):
            await engine.search(request("heart"))
        upstream.down = False
        assert (await engine.search(request("heart"))).ids == ("heart 1",)
    async with ReplayEngine(tmp_path, "pubmed") as replay:
        assert (await replay.search(request("heart"))).ids == ("heart 1",)


async def test_two_rewarders_of_a_host_record_one_answer_and_are_given_it(tmp_path: Path) -> None:
    class Slow(DatedEngine):
        gate = asyncio.Event()

        async def search(self, request: SearchRequest) -> SearchResult:
            await self.gate.wait()
            return SearchResult(("another answer",), 1)

    slow = Slow()
    async with (
        RecordingEngine(DatedEngine(), tmp_path, "pubmed") as one,
        RecordingEngine(slow, tmp_path, "pubmed") as two,
    ):
        late = asyncio.create_task(two.search(request("heart")))
        await asyncio.sleep(0.05)
        first = await one.search(request("heart"))
        slow.gate.set()
        assert await late == first, "though its engine said something else"
    async with ReplayEngine(tmp_path, "pubmed") as replay:
        assert await replay.search(request("heart")) == first


async def test_files_of_several_hosts_are_one_recording(tmp_path: Path) -> None:
    async with RecordingEngine(DatedEngine(), tmp_path, "pubmed", host="later", now=lambda: 20.0) as engine:
        await engine.search(request("other"))
        await engine.search(request("heart"))
    async with RecordingEngine(DatedEngine(), tmp_path, "pubmed", host="sooner", now=lambda: 10.0) as engine:
        await engine.search(request("heart"))
        await engine.search(request("lung"))
    async with ReplayEngine(tmp_path, "pubmed") as replay:
        assert (await replay.search(request("heart"))).ids == ("heart 1",), "the earlier answer"
        assert (await replay.search(request("other"))).ids == ("other 1",)
        assert (await replay.search(request("lung"))).ids == ("lung 2",)


async def test_a_replay_changes_nothing(tmp_path: Path) -> None:
    async with RecordingEngine(DatedEngine(), tmp_path, "pubmed", host="here") as engine:
        await engine.search(request("heart"))
    file = tmp_path / "here.sqlite"
    before = file.read_bytes()
    file.chmod(0o444)
    async with ReplayEngine(tmp_path, "pubmed") as replay:
        await replay.search(request("heart"))
        with pytest.raises(ReplayMiss):
            await replay.search(request("lung"))
    assert file.read_bytes() == before


async def test_what_cannot_be_replayed_is_said_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match=r"no recording in .* search\.cache\.mode=record"):
        await ReplayEngine(tmp_path / "none", "pubmed").start()
    async with RecordingEngine(DatedEngine(), tmp_path, "ctgov") as engine:
        await engine.search(request("heart"))
    with pytest.raises(RecordingError, match=r"is one of ctgov, but search\.engine is pubmed"):
        await ReplayEngine(tmp_path, "pubmed").start()
    with pytest.raises(RecordingError, match=r"is one of ctgov, but search\.engine is pubmed"):
        await RecordingEngine(DatedEngine(), tmp_path, "pubmed").start()
    (tmp_path / "damaged.sqlite").write_bytes(b"nothing" * 1000)
    with pytest.raises(RecordingError, match=r"damaged\.sqlite cannot be read"):
        await ReplayEngine(tmp_path, "ctgov").start()


async def test_a_recording_that_cannot_be_written_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordingError, match=r"name another folder as search\.cache\.folder"):
        await RecordingEngine(DatedEngine(), tmp_path / "file", "pubmed").start()
    async with RecordingEngine(DatedEngine(), tmp_path, "pubmed") as engine:
        assert engine._thread is not None
        await engine._thread.run(_fill)
        with pytest.raises(RecordingError, match=r"cannot be written .*full.* free space"):
            await engine.search(request("heart" * 100_000))


def _fill(table: SearchTable) -> None:
    assert table.connection.execute("PRAGMA max_page_count = 1").fetchone() is not None
    assert isinstance(table.connection, sqlite3.Connection)
