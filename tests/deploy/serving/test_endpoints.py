"""Rewriting and searching over HTTP, and what is refused with which reason."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.deploy.serving.served import Served, served


@pytest.fixture
async def http(server: Served) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(server.url) as session:
        yield session


async def post(http: aiohttp.ClientSession, path: str, body: Any) -> Any:
    async with http.post(path, json=body) as reply:
        assert reply.status == 200, await reply.text()
        return await reply.json()


async def test_one_request_with_its_results(http: aiohttp.ClientSession) -> None:
    reply = await post(http, "/rewrite", {"request": "Does aspirin help?", "search": True, "top": 1})
    (rewrite,) = reply["rewrites"]
    assert reply["model"] == "tiny"
    assert rewrite["query"] == rewrite["found"]["query"]
    assert (rewrite["index"], rewrite["invalid"], rewrite["task"]) == (0, "", "publication_search")


async def test_a_batch_keeps_its_order_and_one_failure_is_its_own(http: aiohttp.ClientSession) -> None:
    texts = ["aspirin", "too long " * 200, "sleep"]
    reply = await post(http, "/rewrite", {"requests": texts})
    assert [rewrite["request"] for rewrite in reply["rewrites"]] == texts
    assert [bool(rewrite["invalid"]) for rewrite in reply["rewrites"]] == [False, True, False]
    assert "actor.max_model_len" in reply["rewrites"][1]["invalid"]


async def test_a_stream_has_a_line_per_rewrite(http: aiohttp.ClientSession) -> None:
    body = {"requests": ["aspirin", "sleep"], "n": 2, "temperature": 1.0, "seed": 3, "stream": True}
    async with http.post("/rewrite", json=body) as reply:
        assert reply.content_type == "application/x-ndjson"
        lines = [json.loads(line) async for line in reply.content]
    assert sorted(line["index"] for line in lines) == [0, 0, 1, 1]
    whole = await post(http, "/rewrite", {**body, "stream": False})
    assert sorted(line["query"] for line in lines) == sorted(each["query"] for each in whole["rewrites"])


@pytest.mark.parametrize("n", [1, 2])
async def test_a_stream_with_deltas_tells_the_text_as_it_grows(http: aiohttp.ClientSession, n: int) -> None:
    body = {"requests": ["aspirin", "sleep"], "n": n, "temperature": 1.0, "seed": 3, "stream": True, "deltas": True}
    texts: dict[tuple[int, int], str] = {}
    pieces, finished = 0, 0
    async with http.post("/rewrite", json=body) as reply:
        async for line in reply.content:
            each = json.loads(line)
            place = each["index"], each["sample"]
            if "query" in each:
                told = texts.pop(place)
                # Of a response that was cut the end is ours: only the rewrite has it.
                assert each["text"] == told if not each["cut"] else each["text"].startswith(told[:-8])
                finished += 1
            else:
                pieces += 1
                texts[place] = each["text"] if each["anew"] else texts.get(place, "") + each["text"]
    assert finished == 2 * n
    assert not texts
    assert pieces > 2 * finished, "it streams"


async def test_searching(http: aiohttp.ClientSession) -> None:
    reply = await post(http, "/search", {"queries": ["aspirin AND stroke", "(aspirin", "nothinglikethis"]})
    found, refused, empty = reply["results"]
    assert found["hits"] == [{"id": "d1", "title": "Aspirin and stroke", "url": ""}]
    assert "unbalanced" in refused["refused"]
    assert (empty["count"], empty["hits"]) == (0, [])


@pytest.mark.parametrize(
    ("path", "body", "status", "reason"),
    [
        ("/rewrite", "{", 422, "JSON"),
        ("/rewrite", "[]", 422, "body"),
        ("/rewrite", "{}", 422, "either request or requests"),
        ("/rewrite", '{"request": "a", "requests": ["b"]}', 422, "either request or requests"),
        ("/rewrite", '{"request": 5}', 422, "body.request: "),
        ("/rewrite", '{"request": ""}', 422, "at least 1 character"),
        ("/rewrite", '{"request": "a", "temprature": 1}', 422, "body.temprature: "),
        ("/rewrite", '{"request": "a", "temperature": -1}', 422, "body.temperature: "),
        ("/rewrite", '{"requests": []}', 422, "body.requests: "),
        ("/rewrite", '{"request": "a", "max_tokens": 1}', 422, "body.max_tokens: "),
        ("/rewrite", '{"request": "  "}', 400, "empty"),
        ("/rewrite", '{"request": "a", "n": 2}', 400, "temperature above 0"),
        ("/rewrite", '{"request": "a", "task": "nope"}', 400, "there is no task 'nope'"),
        ("/rewrite", '{"request": "a", "task": "os:system"}', 400, "there is no task 'os:system'"),
        ("/rewrite", '{"request": "a", "task": "trial_search", "search": true}', 400, "no engine is started"),
        ("/rewrite", '{"request": "a", "task": "text_to_sql", "database": "x"}', 400, "name of a database"),
        ("/search", '{"query": "a", "max_date": "tomorrow"}', 400, "date"),
        ("/search", '{"query": "a", "task": "trial_search"}', 400, "no engine is started"),
        ("/v1/chat/completions", "{}", 501, "vLLM"),
        ("/scale_elastic_ep", "{}", 404, "nothing at"),
    ],
)
async def test_a_refusal_says_why(http: aiohttp.ClientSession, path: str, body: str, status: int, reason: str) -> None:
    async with http.post(path, data=body, headers={"Content-Type": "application/json"}) as reply:
        refused = await reply.json()
    assert reply.status == status, refused
    assert reason in refused["detail"], refused


async def test_a_body_that_is_too_large_is_not_read(server: Served, http: aiohttp.ClientSession) -> None:
    async with http.post("/rewrite", data=b"x" * (5 << 20)) as reply:
        assert reply.status == 413
        assert "4194304 bytes" in (await reply.json())["detail"]

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b"x" * (1 << 20)

    with pytest.raises((aiohttp.ClientError, AssertionError)):
        async with http.post("/rewrite", data=endless()) as reply:
            assert reply.status != 413
    async with http.get("/health") as reply:
        assert (reply.status, (await reply.json())["status"]) == (200, "ok")


async def test_what_the_tasks_are(http: aiohttp.ClientSession) -> None:
    async with http.get("/tasks") as reply:
        known = await reply.json()
    first = known["tasks"][0]
    assert (first["name"], first["searchable"], first["engine"]) == ("publication_search", True, "pubmed")
    assert {task["name"] for task in known["tasks"]} >= {"trial_search", "ranking", "text_to_sql", "evidence_seeking"}
    assert known["openai"] is False


async def test_prometheus_sees_what_was_done(http: aiohttp.ClientSession) -> None:
    async def figure(name: str) -> float:
        async with http.get("/metrics") as reply:
            lines = (await reply.text()).splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    name = 'deepretrieval_requests_total{endpoint="rewrite",outcome="answered"}'
    before = await figure(name)
    await post(http, "/rewrite", {"request": "aspirin"})
    assert await figure(name) == before + 1
    assert await figure("deepretrieval_generated_tokens_total") > 0


async def test_the_api_describes_itself(http: aiohttp.ClientSession) -> None:
    async with http.get("/openapi.json") as reply:
        paths = (await reply.json())["paths"]
    assert {"/rewrite", "/search", "/tasks", "/health", "/metrics"} <= set(paths)


async def test_a_client_that_goes_frees_its_place(server: Served, http: aiohttp.ClientSession) -> None:
    body = {"requests": ["aspirin"] * 64, "n": 16, "temperature": 1.0, "max_tokens": 200}
    with pytest.raises(asyncio.TimeoutError):
        await http.post("/rewrite", json=body, timeout=aiohttp.ClientTimeout(total=0.5))
    await asyncio.wait_for(post(http, "/rewrite", {"request": "sleep"}), 30)


async def test_key_and_load(model: Path, corpus: Path, tmp_path: Path) -> None:
    words = ("actor.engine=transformers", "--max-waiting", "1", "--no-search")
    with served(model, corpus, tmp_path / "log", *words, key="secret-key") as running:
        async with aiohttp.ClientSession(running.url) as http:
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret-key"}):
                async with http.post("/rewrite", json={"request": "a"}, headers=headers) as reply:
                    assert reply.status == 401
                    assert "wants its key" in (await reply.json())["detail"]
            for path in ("/", "/health"):
                async with http.get(path) as reply:
                    assert reply.status == 200
        async with aiohttp.ClientSession(running.url, headers={"Authorization": "Bearer secret-key"}) as http:
            body = {"request": "a", "max_tokens": 200, "n": 16, "temperature": 1.0}
            replies = await asyncio.gather(*(http.post("/rewrite", json=body) for _ in range(8)))
            statuses = sorted(reply.status for reply in replies)
            assert set(statuses) == {200, 429}
            busy = next(reply for reply in replies if reply.status == 429)
            assert busy.headers["Retry-After"] == "1"
            async with http.post("/search", json={"query": "a"}) as reply:
                assert (reply.status, "searching is off" in await reply.text()) == (400, True)
    assert "secret-key" not in (tmp_path / "log").read_text()
