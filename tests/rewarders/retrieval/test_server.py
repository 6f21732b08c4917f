"""Server and client of local retrieval, end to end over HTTP, with an index simple enough to check by eye."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from rewarders.engines.base import BadQuery, EngineUnavailable, SearchRequest
from rewarders.engines.retrieval import RetrievalEngine, RetrievalSettings
from rewarders.engines.retrieval_wire import MAX_TERM_CHARACTERS, Search, Searches
from rewarders.servers.retrieval.app import RunningServer, serve
from rewarders.servers.retrieval.lucene import LuceneBackend, LuceneSettings
from rewarders.servers.traffic import ServerSettings
from tests.rewarders.retrieval.worlds import WordIndex, texts, write_corpus


class World:
    def __init__(self, server: RunningServer, index: WordIndex, engine: RetrievalEngine) -> None:
        self.server, self.index, self.engine = server, index, engine

    async def ids(self, term: str, k: int = 5) -> tuple[str, ...]:
        return (await self.engine.search(SearchRequest(term, k))).ids


@asynccontextmanager
async def world(folder: Path, client: dict[str, Any] | None = None, **server: Any) -> AsyncIterator[World]:
    documents = texts()
    index = WordIndex(documents)
    settings = ServerSettings(corpus=write_corpus(folder, documents), cache_folder=folder / "cache", **server)
    async with (
        await serve(settings, index) as running,
        RetrievalEngine(RetrievalSettings(running.base_url, **(client or {}))) as engine,
    ):
        yield World(running, index, engine)
    assert index.closed


def holders(word: str) -> list[str]:
    return sorted(key for key, (title, text) in texts().items() if word in f"{title} {text}".split())


async def test_a_search(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        result = await made.engine.search(SearchRequest("alpha", 3))
        assert (list(result.ids), result.count) == (holders("alpha")[:3], len(holders("alpha")))
        assert (result.texts, result.titles) == (None, None)
        with_texts = await made.engine.search(SearchRequest("alpha", 3, with_texts=True))
        assert with_texts.titles == tuple(texts()[key][0] for key in result.ids)
        assert with_texts.texts == tuple(texts()[key][1] for key in result.ids)
        nothing = await made.engine.search(SearchRequest("absent", 3, with_texts=True))
        assert (nothing.ids, nothing.texts, nothing.count) == ((), (), 0)
        assert await made.engine.data_version() == "words-1"
        await made.engine.check()


async def test_a_refusal_is_a_bad_query_and_harms_nobody(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        bad, good = await asyncio.gather(made.ids("bad"), made.ids("alpha"), return_exceptions=True)
        assert isinstance(bad, BadQuery)
        assert bad.reason == "a bad word"
        assert good == tuple(holders("alpha")[:5])
        assert made.engine.requests_sent == 1
        for term in ("\ud800", "x" * (MAX_TERM_CHARACTERS + 1)):
            with pytest.raises(BadQuery):
                await made.ids(term)
        assert made.engine.requests_sent == 1, "what no request can carry is not sent"


async def test_what_arrives_meanwhile_is_one_batch(tmp_path: Path) -> None:
    async with world(tmp_path, {"max_requests": 2, "max_searches": 8}) as made:
        made.index.free.clear()
        searches = [asyncio.create_task(made.ids("alpha", 1 + number % 3)) for number in range(60)]
        while made.engine.requests_sent < 2:
            await asyncio.sleep(0.01)
        made.index.free.set()
        found = await asyncio.gather(*searches)
        assert [len(ids) for ids in found] == [1 + number % 3 for number in range(60)]
        assert made.engine.requests_sent == 8
        assert sum(made.index.batches) == 60
        assert max(made.index.batches) <= 16


async def test_large_answers_travel_in_more_requests(tmp_path: Path) -> None:
    async with world(tmp_path, {"max_requests": 1, "max_documents": 100, "max_texts": 10}) as made:
        await asyncio.gather(*(made.ids("alpha", 50) for _ in range(6)))
        assert made.engine.requests_sent == 3
        await asyncio.gather(*(made.engine.search(SearchRequest("alpha", 20, with_texts=True)) for _ in range(3)))
        assert made.engine.requests_sent == 6


async def test_an_index_that_fails_is_no_bad_query(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        made.index.down = True
        with pytest.raises(EngineUnavailable, match="the index is down"):
            await made.ids("bad")
        made.index.down = False
        assert await made.ids("alpha")
        with pytest.raises(EngineUnavailable, match="nobody"):
            await made.engine.search(SearchRequest("ghost", 1, with_texts=True))


async def test_faults_and_quota_are_no_bad_queries(tmp_path: Path) -> None:
    async with world(tmp_path, fault_rate=0.5, fault_seed=1) as made:
        outcomes = [await asyncio.gather(made.ids("alpha"), return_exceptions=True) for _ in range(40)]
        failed = [outcome for (outcome,) in outcomes if isinstance(outcome, EngineUnavailable)]
        assert 5 < len(failed) < 35
        assert all(outcome.reason == "status 503 from the search server" for outcome in failed)
    async with world(tmp_path, quota=2, window_s=3600.0, retry_after_s=7) as made:
        assert await made.ids("alpha")
        assert await made.ids("bad" * 3) == ()
        with pytest.raises(EngineUnavailable, match="429") as caught:
            await made.ids("alpha")
        assert caught.value.retry_after_s == 7


async def test_a_server_that_is_gone(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        assert await made.ids("alpha")
        made.index.free.clear()
        waiting = [asyncio.create_task(made.ids("beta")) for _ in range(3)]
        while len(made.index.batches) < 2:
            await asyncio.sleep(0.01)
        await made.server.close()
        for outcome in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(outcome, EngineUnavailable)
        with pytest.raises(EngineUnavailable):
            await made.ids("alpha")
        with pytest.raises(EngineUnavailable, match="127"):
            await made.engine.check()


async def test_a_closed_client(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        made.index.free.clear()
        waiting = [asyncio.create_task(made.ids("beta")) for _ in range(600)]
        while not made.index.batches:
            await asyncio.sleep(0.01)
        await made.engine.close()
        for outcome in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(outcome, EngineUnavailable)
        with pytest.raises(EngineUnavailable, match="closed"):
            await made.ids("beta")


async def test_an_answer_that_comes_too_late(tmp_path: Path) -> None:
    async with world(tmp_path, {"timeout_s": 0.2}) as made:
        made.index.free.clear()
        with pytest.raises(EngineUnavailable, match=r"no answer within 0\.2 s"):
            await made.ids("beta")
        made.index.free.set()


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"<html>",
        msgspec.msgpack.encode({"version": "1", "answers": []}),
        msgspec.msgpack.encode({"version": "1", "answers": [5]}),
        msgspec.msgpack.encode({"version": "1", "answers": [["found", ["a", "b", "c"], 3]]}),
        msgspec.msgpack.encode({"version": "1", "answers": [["found", ["a"], 1, ["t"], []]]}),
        msgspec.msgpack.encode({"version": "1", "answers": [["unanswered", "busy"]]}),
    ],
)
async def test_a_strange_reply_is_no_bad_query(reply: bytes) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(reply), reply))
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as strange:
        port = strange.sockets[0].getsockname()[1]
        async with RetrievalEngine(RetrievalSettings(f"http://127.0.0.1:{port}")) as engine:
            with pytest.raises(EngineUnavailable):
                await engine.search(SearchRequest("x", 2))


async def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        async with RetrievalEngine(RetrievalSettings(f"http://127.0.0.1:{free.getsockname()[1]}")) as engine:
            for attempt in (engine.check(), engine.data_version(), engine.search(SearchRequest("x", 2))):
                with pytest.raises(EngineUnavailable):
                    await attempt


async def test_garbage_is_refused_by_the_server(tmp_path: Path) -> None:
    wrong = [
        b"", b"garbage", b"\x81" * 10_000, msgspec.msgpack.encode({"searches": []}),
        msgspec.msgpack.encode({"searches": [["alpha", 0, False]]}),
        msgspec.msgpack.encode(Searches([Search("x" * (MAX_TERM_CHARACTERS + 1), 1)])),
        msgspec.msgpack.encode(Searches([Search("x", 1)] * 257)),
    ]  # fmt: skip
    async with world(tmp_path) as made, aiohttp.ClientSession() as session:
        for body in wrong:
            async with session.post(f"{made.server.base_url}/search", data=body) as response:
                assert response.status == 400
        async with session.post(f"{made.server.base_url}/search", data=bytes(1 << 26)) as response:
            assert response.status == 413
        async with session.get(f"{made.server.base_url}/health") as response:
            state = await response.json()
        assert (state["status"], state["documents"], state["kind"]) == ("ok", len(texts()), "words")
        assert await made.ids("alpha")


async def test_bm25_end_to_end(tmp_path: Path) -> None:
    pytest.importorskip("pyserini", reason="the extra lucene is not installed")
    corpus = write_corpus(tmp_path, texts())
    backend = LuceneBackend(corpus, LuceneSettings(syntax="boolean"), tmp_path / "cache")
    async with (
        await serve(ServerSettings(corpus=corpus, cache_folder=tmp_path / "cache"), backend) as server,
        RetrievalEngine(RetrievalSettings(server.base_url)) as engine,
    ):
        result = await engine.search(SearchRequest("sigma AND NOT alpha", 100, with_texts=True))
        assert sorted(result.ids) == sorted(set(holders("sigma")) - set(holders("alpha")))
        assert result.texts == tuple(texts()[key][1] for key in result.ids)
        with pytest.raises(BadQuery, match="not closed"):
            await engine.search(SearchRequest("(sigma", 100))
        assert await engine.data_version() == backend.version
