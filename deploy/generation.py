"""The texts of a model, whatever runs it: one interface for evaluation, rewriting and serving."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Literal, Protocol, Self

from common.config import Config
from common.tasks import Message
from deploy.errors import LaunchError
from deploy.models import ModelSource

if TYPE_CHECKING:
    from actors.engine import Engine, EngineName, EngineOptions, TextListener
    from actors.prompts import PromptTokenizer

# Prompts in the engine, as a multiple of what it decodes at once: its batch stays full, and prompts are encoded while
# it decodes instead of all before it begins.
_QUEUED: Final = 2


class GenerationRefused(Exception):  # noqa: N818 (the name of the verdict)
    """This prompt cannot be answered, now or later; others can. The reason is one line."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class PromptTooLong(GenerationRefused):
    """Prompt and response do not fit into what the model takes."""


@dataclass(frozen=True)
class Generated:
    """One response.

    Attributes:
        text: without the prompt and its prefix, cut after the stop string.
        prompt_tokens, tokens: of the prompt and of the response; 0 where an endpoint does not say.
        finish_reason: stop: the stop string, or the model's own end; length: `max_tokens` were generated.
    """

    text: str
    prompt_tokens: int
    tokens: int
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True)
class Draw:
    """How responses are drawn.

    Attributes:
        n: responses.
        temperature: 0 is greedy decoding.
        top_p: nucleus mass, in (0, 1].
        max_tokens: longest response.
        seed: same seed, same responses, as far as the engine can promise; None draws one.
        prefix: beginning of the response, which the model goes on from.
        stop: text that ends a response and is part of it.
        pattern: regular expression that every whole response matches; "": any text. An endpoint is not held to it.
        listener: told how the responses grow, as a `GenerationRequest`'s is; an endpoint's are not.
    """

    n: int
    temperature: float
    top_p: float
    max_tokens: int
    seed: int | None
    prefix: str
    stop: str
    pattern: str = ""
    listener: TextListener | None = None


class Generator(AbstractAsyncContextManager["Generator"], Protocol):
    """Generates for any number of callers at a time; to be used as an async context manager."""

    name: str

    async def generate(self, messages: Sequence[Message] | str, draw: Draw) -> list[Generated]:
        """Responses to a chat.

        Args:
            messages: of the chat; or a whole prompt as text, to which no chat template is applied.

        Raises:
            GenerationRefused: this prompt cannot be answered. EngineUnavailable: an endpoint could not be asked, after
                retries. EngineError: the engine is gone.
        """
        ...

    async def problem(self) -> str | None:
        """Why nothing can be generated from now on; None while it can, as far as anybody knows."""
        return None


class EngineGenerator(Generator):
    """A model in this process, run by the actors' engines: vLLM where it can be imported, else transformers.

    Args:
        model: a Hugging Face folder.
        engine: which, or auto.
    """

    def __init__(self, model: Path, engine: EngineName, options: EngineOptions) -> None:
        from actors.engine import create_engine

        self._model = model
        self._engine: Engine = create_engine(engine, options)
        self._tokenizer: PromptTokenizer | None = None
        self._numbers = itertools.count()
        self._turns = asyncio.Semaphore(_QUEUED * options.max_sequences)
        self.name = self._engine.name

    async def __aenter__(self) -> Self:
        try:
            await self._engine.prepare()
            await self._engine.start(self._model, version=0)
            self._require_chat_template()
        except BaseException:
            await self._engine.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._engine.close()

    async def generate(self, messages: Sequence[Message] | str, draw: Draw) -> list[Generated]:
        from actors.engine import GenerationRequest

        async with self._turns:
            prompt_ids = self._encode(messages, draw.prefix)
            request = GenerationRequest(
                request_id=str(next(self._numbers)),
                prompt_ids=prompt_ids,
                n=draw.n,
                temperature=draw.temperature,
                top_p=draw.top_p,
                max_tokens=draw.max_tokens,
                stop=draw.stop,
                seed=draw.seed,
                pattern=draw.pattern,
                logprobs=False,
                listener=draw.listener,
            )
            self._require_room(len(prompt_ids) + draw.max_tokens)
            completions = await self._engine.generate(request)
        return [Generated(c.text, len(prompt_ids), len(c.token_ids), c.finish_reason) for c in completions]

    async def problem(self) -> str | None:
        return await self._engine.problem()

    @property
    def engine(self) -> Engine:
        """What runs the model."""
        return self._engine

    def _encode(self, messages: Sequence[Message] | str, prefix: str) -> list[int]:
        from actors.prompts import PromptTokenizer
        from common.messages import ChatMessage

        self._tokenizer = self._tokenizer or PromptTokenizer(self._model)
        if isinstance(messages, str):
            return self._tokenizer.text(messages + prefix)
        return self._tokenizer.chat([ChatMessage(**message) for message in messages], prefix)

    def _require_room(self, tokens: int) -> None:
        most = self._engine.options.max_model_len
        if tokens > most:
            raise PromptTooLong(f"prompt and response take {tokens} tokens, actor.max_model_len is {most}: raise it")

    def _require_chat_template(self) -> None:
        try:
            self._encode([{"role": "user", "content": "a"}], "")
        except ValueError as error:
            raise LaunchError(f"the tokenizer of {self._model} cannot render a chat: {error}") from None


def generator_of(source: ModelSource, config: Config, *, statistics: bool = False) -> Generator:
    """The generator of a model, not yet started; `config.actor` and `config.sampling.group_size` say how it runs.

    Args:
        statistics: see `EngineOptions`.

    Raises:
        EngineError: no engine is installed.
    """
    if source.endpoint is not None:
        from deploy.endpoint import EndpointGenerator

        return EndpointGenerator(source.endpoint)
    from deploy.roles import engine_options

    assert source.folder is not None
    options = replace(engine_options(config), statistics=statistics)
    return EngineGenerator(source.folder, config.actor.engine, options)
