"""Texts of a model in this process are what an actor would have generated."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.engine import EngineOptions, GenerationRequest, create_engine
from actors.loop import STOP
from actors.prompts import chat_encoder
from common.config import load_config
from common.messages import ChatMessage
from deploy.errors import LaunchError
from deploy.generation import Draw, Generated, Generator, PromptTooLong, generator_of
from deploy.models import resolve_model
from tests.tiny_model import build_tiny_model

CHAT = [{"role": "system", "content": "Rewrite."}, {"role": "user", "content": "Does aspirin help?"}]
OVERRIDES = ["actor.engine=transformers", "actor.max_model_len=128", "actor.concurrent_groups=2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def generator(model: Path) -> Generator:
    return generator_of(resolve_model(str(model)), load_config(None, OVERRIDES))


async def ask(generator: Generator, prefix: str = "", **changes: float) -> list[Generated]:
    options = {"n": 1, "temperature": 0.0, "top_p": 1.0, "max_tokens": 16, "seed": None} | changes
    return await generator.generate(CHAT, Draw(prefix=prefix, stop=STOP, **options))


async def test_greedy_texts_are_the_actors(model: Path) -> None:
    for prefix in ("", "<think>\n"):
        engine = create_engine("transformers", EngineOptions(max_model_len=128))
        await engine.start(model, version=0)
        prompt = chat_encoder(model, prefix)([ChatMessage(**message) for message in CHAT])
        expected = await engine.generate(GenerationRequest("1", prompt, 1, 0.0, 1.0, 16, STOP))
        await engine.close()
        async with generator(model) as texts:
            (found,) = await ask(texts, prefix)
        assert found.text == expected[0].text
        assert (found.prompt_tokens, found.tokens) == (len(prompt), len(expected[0].token_ids))
        assert found.finish_reason == expected[0].finish_reason


async def test_a_prompt_as_text_is_taken_as_it_is(model: Path) -> None:
    chat = [ChatMessage(**message) for message in CHAT]
    options = {"n": 1, "temperature": 0.0, "top_p": 1.0, "max_tokens": 16, "seed": None}
    markup = "".join(f"<|im_start|>{m.role}\n{m.content}<|im_end|>\n" for m in chat) + "<|im_start|>assistant\n"
    async with generator(model) as texts:
        assert await texts.generate(markup, Draw(prefix="", stop=STOP, **options)) == await ask(texts)
        (longer,) = await texts.generate(markup + " more", Draw(prefix="", stop=STOP, **options))
        assert longer.prompt_tokens > len(chat_encoder(model)(chat))


async def test_a_seed_repeats_its_samples_and_they_differ(model: Path) -> None:
    async with generator(model) as texts:
        first = await ask(texts, n=3, temperature=1.0, seed=5)
        again = await ask(texts, n=3, temperature=1.0, seed=5)
        other = await ask(texts, n=3, temperature=1.0, seed=6)
    assert first == again
    assert len({each.text for each in [*first, *other]}) == 6


async def test_a_prompt_that_does_not_fit_is_refused_and_others_go_on(model: Path) -> None:
    async with generator(model) as texts:
        with pytest.raises(PromptTooLong, match=r"actor\.max_model_len is 128"):
            await ask(texts, max_tokens=120)
        assert len(await ask(texts)) == 1


async def test_a_tokenizer_without_a_chat_template_is_said_at_the_start(tmp_path: Path) -> None:
    model = build_tiny_model(tmp_path / "bare")
    (model / "chat_template.jinja").unlink()
    with pytest.raises(LaunchError, match="cannot render a chat"):
        async with generator(model):
            pass
