"""The texts of a model behind an OpenAI-compatible endpoint (`POST /chat/completions`)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Final, Self

import aiohttp

from common.tasks import Message
from deploy.errors import LaunchError
from deploy.generation import Draw, Generated, GenerationRefused, Generator
from deploy.models import KEY_VARIABLE, Endpoint

_CONNECTIONS: Final = 32
_TIMEOUT_S: Final = 300.0
_ATTEMPTS: Final = 6
_SAID_CHARACTERS: Final = 200  # of what the endpoint says to an error
_REFUSALS: Final = (400, 413, 422)  # of this one request: too long, or not allowed
_PASSING: Final = (408, 409, 425, 429)


class EndpointGenerator(Generator):
    """Asks an endpoint, with retries; every sample is a request of its own, for not every server knows `n`.

    The stop string is looked for here and not sent: a server leaves it out of the text, and nobody could tell a
    response that reached it from one that ended before.
    """

    def __init__(self, endpoint: Endpoint, attempts: int = _ATTEMPTS) -> None:
        from rewarders.retry import Retrier, RetryPolicy

        self.name = f"endpoint {endpoint.base_url}"
        self._endpoint = endpoint
        self._retrier = Retrier(RetryPolicy(attempts=attempts, max_wait_s=60.0, budget_ratio=1.0))
        self._turns = asyncio.Semaphore(_CONNECTIONS)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        key = self._endpoint.api_key
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S),
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def generate(self, messages: Sequence[Message] | str, draw: Draw) -> list[Generated]:
        if draw.prefix or isinstance(messages, str):
            raise LaunchError(
                "an endpoint of chats takes no text as it is and no beginning of an answer: leave out "
                "--prompt original and task.options.prefill"
            )
        body = {
            "model": self._endpoint.model,
            "messages": list(messages),
            "temperature": draw.temperature,
            "top_p": draw.top_p,
            "max_tokens": draw.max_tokens,
        }
        seeds = [None if draw.seed is None else draw.seed + sample for sample in range(draw.n)]
        return list(await asyncio.gather(*(self._sample(body, each, draw.stop) for each in seeds)))

    async def _sample(self, body: dict[str, Any], seed: int | None, stop: str) -> Generated:
        sent = body if seed is None else {**body, "seed": seed}
        async with self._turns:
            reply = await self._retrier.run(lambda: self._ask(sent))
        return _read(reply, stop)

    async def _ask(self, body: dict[str, Any]) -> Any:
        """One request. Raises as `Generator.generate`, and LaunchError where every request would fail."""
        from rewarders.engines.base import EngineUnavailable
        from rewarders.engines.verdicts import retry_after_seconds

        assert self._session is not None, "use the generator as an async context manager"
        address = f"{self._endpoint.base_url}/chat/completions"
        try:
            async with self._session.post(address, json=body, allow_redirects=False) as response:
                status, content = response.status, await response.read()
                wait = retry_after_seconds(response.headers.get("Retry-After"))
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise EngineUnavailable(f"{address}: {type(error).__name__}") from None
        if status == 200:
            try:
                return json.loads(content)
            except ValueError:
                raise EngineUnavailable(f"{address}: the answer is no JSON") from None
        said = f"{address}: status {status}: {self._said(content)}"
        if status in _REFUSALS:
            raise GenerationRefused(said)
        if status in _PASSING or status >= 500:
            raise EngineUnavailable(said, wait)
        hint = f"; the key comes from {KEY_VARIABLE} or --api-key-file" if status in (401, 403) else ""
        raise LaunchError(said + hint)

    def _said(self, content: bytes) -> str:
        from rewarders.engines.api_keys import without_key

        text = without_key(content, self._endpoint.api_key).decode("utf-8", errors="replace")
        return " ".join(text.split())[:_SAID_CHARACTERS]


def _read(reply: Any, stop: str) -> Generated:
    """Raises EngineUnavailable for a reply without a text."""
    from rewarders.engines.base import EngineUnavailable

    try:
        choice = reply["choices"][0]
        text = choice["message"]["content"] or ""
        usage = reply.get("usage") or {}
        counts = int(usage.get("prompt_tokens", 0)), int(usage.get("completion_tokens", 0))
    except (AttributeError, LookupError, TypeError, ValueError):
        raise EngineUnavailable("the endpoint's answer is no chat completion") from None
    if not isinstance(text, str):
        raise EngineUnavailable("the endpoint's answer holds no text")
    end = text.find(stop)
    if end >= 0:
        return Generated(text[: end + len(stop)], *counts, "stop")
    return Generated(text, *counts, "length" if choice.get("finish_reason") == "length" else "stop")
