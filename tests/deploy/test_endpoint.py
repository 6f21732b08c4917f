"""An OpenAI-compatible endpoint: what is sent, what is made of its answers, and of its refusals."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from deploy.endpoint import EndpointGenerator
from deploy.errors import LaunchError
from deploy.generation import Draw, Generated, GenerationRefused
from deploy.models import Endpoint
from rewarders.engines.base import EngineUnavailable

KEY = "sk-planted-0123456789"
Answer = Callable[[dict[str, Any], int], web.Response]


@asynccontextmanager
async def endpoint(answer: Answer, attempts: int = 3) -> AsyncIterator[tuple[EndpointGenerator, list[dict[str, Any]]]]:
    """A generator on a server that answers `answer(body, number of the request)`, and the bodies it got."""
    bodies: list[dict[str, Any]] = []

    async def handle(request: web.Request) -> web.Response:
        assert request.headers["Authorization"] == f"Bearer {KEY}"
        bodies.append(await request.json())
        return answer(bodies[-1], len(bodies))

    app = web.Application()
    app.router.add_post("/v1/chat/completions", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    try:
        async with EndpointGenerator(Endpoint(f"http://127.0.0.1:{port}/v1", "m", KEY), attempts) as generator:
            yield generator, bodies
    finally:
        await runner.cleanup()


def completion(text: str | None, finish: str = "stop") -> web.Response:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return web.json_response({"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 3}})


def ask(generator: EndpointGenerator, **changes: Any) -> Awaitable[list[Generated]]:
    options = {"n": 1, "temperature": 0.5, "top_p": 0.9, "max_tokens": 11, "seed": 4, "prefix": "", "stop": "</a>"}
    return generator.generate([{"role": "user", "content": "hello"}], Draw(**(options | changes)))


async def test_every_sample_is_a_request_with_its_own_seed() -> None:
    async with endpoint(lambda body, _: completion(f"<a>{body['seed']}</a> and more")) as (generator, bodies):
        found = await ask(generator, n=3)
    assert [each.text for each in found] == ["<a>4</a>", "<a>5</a>", "<a>6</a>"], "cut after the stop string"
    assert found[0] == Generated("<a>4</a>", 7, 3, "stop")
    assert {body["model"] for body in bodies} == {"m"}
    assert bodies[0] | {"seed": 0} == {
        "model": "m",
        "messages": [{"role": "user", "content": "hello"}],
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 11,
        "seed": 0,
    }


async def test_a_text_that_was_cut_or_is_missing() -> None:
    async with endpoint(lambda *_: completion("<a>no end", "length")) as (generator, bodies):
        assert (await ask(generator, seed=None))[0].finish_reason == "length"
        assert "seed" not in bodies[0]
    async with endpoint(lambda *_: completion(None)) as (generator, _):
        assert (await ask(generator))[0].text == ""


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_what_passes_is_tried_again(status: int) -> None:
    def answer(_: dict[str, Any], number: int) -> web.Response:
        return web.Response(status=status, headers={"Retry-After": "0"}) if number == 1 else completion("fine")

    async with endpoint(answer) as (generator, bodies):
        assert (await ask(generator))[0].text == "fine"
    assert len(bodies) == 2


async def test_an_outage_is_unavailable_and_no_empty_answer() -> None:
    async with endpoint(lambda *_: web.Response(status=502, text="bad gateway"), attempts=2) as (generator, bodies):
        with pytest.raises(EngineUnavailable, match="502: bad gateway"):
            await ask(generator)
    assert len(bodies) == 2
    async with endpoint(lambda *_: web.json_response({"choices": []}), attempts=1) as (generator, _):
        with pytest.raises(EngineUnavailable, match="no chat completion"):
            await ask(generator)


async def test_one_prompt_may_be_refused_but_a_wrong_key_ends_everything() -> None:
    async with endpoint(lambda *_: web.Response(status=400, text="context length exceeded")) as (generator, bodies):
        with pytest.raises(GenerationRefused, match="context length exceeded"):
            await ask(generator)
    assert len(bodies) == 1, "not tried again"
    async with endpoint(lambda *_: web.Response(status=401, text=f"wrong key {KEY}")) as (generator, _):
        with pytest.raises(LaunchError, match="OPENAI_API_KEY") as caught:
            await ask(generator)
    assert KEY not in str(caught.value)


async def test_a_given_beginning_cannot_be_sent() -> None:
    async with endpoint(lambda *_: completion("never asked")) as (generator, bodies):
        with pytest.raises(LaunchError, match="prefill"):
            await ask(generator, prefix="<think>")
    assert bodies == []
