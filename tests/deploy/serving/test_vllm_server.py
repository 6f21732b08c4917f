"""By vLLM: OpenAI's client, valid answers without exception, many at once, and an orderly end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import openai
import pytest

from actors.engine import vllm_problem
from common.tasks import ParsedAnswer, load_task
from tests.deploy.serving.served import Served, served

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(vllm_problem() is not None, reason=str(vllm_problem())),
]


@pytest.fixture(scope="module")
def server(model: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(model, corpus, tmp_path_factory.mktemp("vllm") / "log", "actor.engine=vllm", key="k") as running:
        yield running


@pytest.fixture
def client(server: Served) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="k")


CHAT = [{"role": "user", "content": "Does aspirin help?"}]


async def test_openais_client(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["tiny"]
    options = {"model": "tiny", "messages": CHAT, "max_tokens": 12, "temperature": 0}
    whole = await client.chat.completions.create(**options)  # type: ignore[call-overload]
    pieces = [
        chunk.choices[0].delta.content or ""
        async for chunk in await client.chat.completions.create(**options, stream=True)  # type: ignore[call-overload]
        if chunk.choices
    ]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len(pieces) > 2, "it streams"


async def test_openais_client_is_guided_by_the_pattern_of_a_task(server: Served, client: openai.AsyncOpenAI) -> None:
    task = load_task("publication_search", prompt="short")
    headers = {"Authorization": "Bearer k"}
    async with aiohttp.request("GET", f"{server.url}/tasks", headers=headers) as reply:
        pattern = (await reply.json())["tasks"][0]["pattern"]
    assert pattern == task.answer_pattern
    guided = await client.chat.completions.create(
        model="tiny",
        messages=CHAT,  # type: ignore[arg-type]
        max_tokens=200,
        temperature=0,
        extra_body={
            "structured_outputs": {"regex": pattern},
            "stop": ["</answer>"],
            "include_stop_str_in_output": True,
        },
    )
    text = guided.choices[0].message.content or ""
    if guided.choices[0].finish_reason == "length":
        text = task.closed(text) or text
    assert text.startswith("<think>")


async def test_a_wrong_key_and_a_wrong_body(server: Served, client: openai.AsyncOpenAI) -> None:
    stranger = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        await stranger.models.list()
    with pytest.raises(openai.NotFoundError):
        await client.chat.completions.create(model="another", messages=CHAT)  # type: ignore[arg-type]
    with pytest.raises(openai.BadRequestError):
        await client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=-1)  # type: ignore[arg-type]


async def test_a_thousand_answers_of_random_weights_are_all_valid(server: Served) -> None:
    async with aiohttp.ClientSession(server.url, headers={"Authorization": "Bearer k"}) as http:

        async def batch(number: int) -> list[dict[str, object]]:
            texts = [f"request {number}-{each}: aspirin?" for each in range(50)]
            body = {"requests": texts, "temperature": 1.0, "seed": number, "max_tokens": 40}
            async with http.post("/rewrite", json=body) as reply:
                return list((await reply.json())["rewrites"])

        rewrites = [each for group in await asyncio.gather(*map(batch, range(20))) for each in group]
    task = load_task("publication_search", prompt="short")
    assert len(rewrites) == 1000
    for rewrite in rewrites:
        answer = task.parse(str(rewrite["text"]))
        assert isinstance(answer, ParsedAnswer), rewrite
        assert answer.query == rewrite["query"]


async def test_two_hundred_at_once_none_lost(server: Served) -> None:
    async with aiohttp.ClientSession(
        server.url, headers={"Authorization": "Bearer k"}, connector=aiohttp.TCPConnector(limit=0)
    ) as http:

        async def one(number: int) -> str:
            async with http.post("/rewrite", json={"request": f"aspirin {number}", "search": True}) as reply:
                (rewrite,) = (await reply.json())["rewrites"]
            assert rewrite["found"] is not None
            return str(rewrite["request"])

        answered = await asyncio.gather(*map(one, range(200)))
    assert answered == [f"aspirin {number}" for number in range(200)]


async def test_prometheus_has_vllms_figures_too(server: Served) -> None:
    async with aiohttp.request("GET", f"{server.url}/metrics", headers={"Authorization": "Bearer k"}) as reply:
        figures = await reply.text()
    assert "vllm:generation_tokens_total" in figures
    assert "deepretrieval_" in figures


async def test_what_is_under_way_is_finished_when_it_is_stopped(model: Path, corpus: Path, tmp_path: Path) -> None:
    with served(model, corpus, tmp_path / "log", "actor.engine=vllm", "--no-search") as running:
        async with aiohttp.ClientSession(running.url) as http:
            body = {"request": "a", "n": 8, "temperature": 1.0, "max_tokens": 200}
            asked = asyncio.create_task(http.post("/rewrite", json=body))
            await asyncio.sleep(0.3)
            running.process.send_signal(signal.SIGTERM)
            reply = await asyncio.wait_for(asked, 60)
            assert len((await reply.json())["rewrites"]) == 8
        assert await asyncio.to_thread(running.process.wait, 30) in (0, -signal.SIGTERM, 130)


async def test_a_server_whose_engine_dies_ends_and_says_so(model: Path, corpus: Path, tmp_path: Path) -> None:
    with served(model, corpus, tmp_path / "log", "actor.engine=vllm", "--no-search") as running:
        children = Path(f"/proc/{running.process.pid}/task/{running.process.pid}/children").read_text().split()
        for child in children:
            os.kill(int(child), signal.SIGKILL)
        assert await asyncio.to_thread(running.process.wait, 30) == 1
    assert "the model is gone" in json.dumps(running.log.read_text())
