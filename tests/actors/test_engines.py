"""Both engines on a tiny real model, against Hugging Face's own forward pass."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import regex
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from actors.engine import (
    Completion,
    Engine,
    EngineError,
    EngineName,
    EngineOptions,
    GenerationRequest,
    create_engine,
    vllm_problem,
)
from common.tasks import ParsedAnswer, load_task
from tests.tiny_model import TURN_END, build_tiny_model

TOLERANCE = 1e-3  # nats
NEVER = "\x00never\x00"  # a stop string that no text contains
MAX_MODEL_LEN = 256

ENGINES = [
    pytest.param("transformers"),
    pytest.param(
        "vllm", marks=[pytest.mark.slow, pytest.mark.skipif(vllm_problem() is not None, reason=str(vllm_problem()))]
    ),
]
pytestmark = pytest.mark.asyncio(loop_scope="module")


@dataclass(frozen=True)
class World:
    """Two models of one architecture, and what a test needs of them."""

    old_dir: Path
    new_dir: Path
    old: Any
    new: Any
    tokenizer: Any

    @property
    def old_file(self) -> Path:
        return self.old_dir / "model.safetensors"

    @property
    def new_file(self) -> Path:
        return self.new_dir / "model.safetensors"

    def prompt(self, text: str) -> list[int]:
        messages = [{"role": "user", "content": text}]
        return list(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("models")
    old = build_tiny_model(root / "old", seed=0)
    new = build_tiny_model(root / "new", seed=1)
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (old, new)]
    return World(old, new, models[0], models[1], AutoTokenizer.from_pretrained(old))


@pytest.fixture(scope="module", params=ENGINES)
def engine_name(request: pytest.FixtureRequest) -> EngineName:
    name: EngineName = request.param
    return name


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def started(engine_name: EngineName, world: World) -> AsyncIterator[Engine]:
    engine = create_engine(engine_name, EngineOptions(max_model_len=MAX_MODEL_LEN, max_sequences=64))
    await engine.start(world.old_dir, version=1)
    yield engine
    await engine.close()


@pytest_asyncio.fixture(loop_scope="module")
async def engine(started: Engine, world: World) -> Engine:
    """The module's engine with the old weights, whatever the test before has loaded."""
    await started.load_weights(world.old_file, version=1)
    return started


def request(prompt: list[int], **changes: Any) -> GenerationRequest:
    fields: dict[str, Any] = {
        "request_id": f"r{time.perf_counter_ns()}",
        "prompt_ids": prompt,
        "n": 1,
        "temperature": 1.0,
        "top_p": 1.0,
        "max_tokens": 24,
        "stop": NEVER,
        "seed": 7,
    }
    return GenerationRequest(**{**fields, **changes})


def behaviour_logprobs(logits: np.ndarray, tokens: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """Reference in float64: [T] log-probabilities of ``tokens`` under softmax(logits / temperature) cut to top_p."""
    logits = logits.astype(np.float64) / (temperature or 1.0)
    result = []
    for row, token in zip(logits, tokens, strict=True):
        probabilities = np.exp(row - row.max())
        probabilities /= probabilities.sum()
        if temperature > 0 and top_p < 1:
            order = np.argsort(-probabilities)
            kept = order[: int(np.searchsorted(np.cumsum(probabilities[order]), top_p)) + 1]
            nucleus = np.zeros_like(probabilities)
            nucleus[kept] = probabilities[kept]
            probabilities = nucleus / nucleus.sum()
        result.append(np.log(probabilities[token]))
    return np.array(result)


@torch.no_grad()
def next_logits(model: Any, prompt: list[int], tokens: np.ndarray) -> np.ndarray:
    """[T, V]: the logits from which each of ``tokens`` was drawn, teacher-forced."""
    ids = torch.tensor([[*prompt, *tokens.tolist()]])
    return model(ids).logits[0, len(prompt) - 1 : -1].numpy()


@torch.no_grad()
def next_logits_after_swap(old: Any, new: Any, prompt: list[int], tokens: np.ndarray, swap: int) -> np.ndarray:
    """[T - swap, V]: logits of the tokens from ``swap`` on, by ``new`` with the KV cache that ``old`` left."""
    ids = torch.tensor([[*prompt, *tokens.tolist()]])
    known = len(prompt) + swap - 1  # the last token drawn by the old weights is read by the new ones
    cache = DynamicCache()
    old(ids[:, :known], past_key_values=cache, use_cache=True)
    return new(ids[:, known:-1], past_key_values=cache, use_cache=True).logits[0].numpy()


@torch.no_grad()
def greedy(model: Any, prompt: list[int], length: int, eos: int) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < length and (not tokens or tokens[-1] != eos):
        tokens.append(int(model(torch.tensor([[*prompt, *tokens]])).logits[0, -1].argmax()))
    return tokens


def check_shape(completion: Completion, version: int | None = None) -> None:
    assert completion.token_ids.dtype == np.int32
    assert completion.logprobs.dtype == np.float32
    assert completion.logprobs.shape == completion.token_ids.shape
    ends = [0, *(span.end for span in completion.spans)]
    assert [span.start for span in completion.spans] == ends[:-1]
    assert ends[-1] == len(completion.token_ids)
    if version is not None:
        assert {span.version for span in completion.spans} == {version}


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9), (1.5, 1.0), (0.6, 0.5), (0.0, 1.0)])
async def test_logprobs_are_those_of_the_sampled_distribution(
    engine: Engine, world: World, temperature: float, top_p: float
) -> None:
    prompt = world.prompt("aspirin and stroke")
    completions = await engine.generate(request(prompt, n=4, temperature=temperature, top_p=top_p))
    assert len(completions) == 4
    for completion in completions:
        check_shape(completion, version=1)
        logits = next_logits(world.old, prompt, completion.token_ids)
        wanted = behaviour_logprobs(logits, completion.token_ids, temperature, top_p)
        np.testing.assert_allclose(completion.logprobs, wanted, atol=TOLERANCE)


async def test_greedy_decoding_follows_the_weights(engine: Engine, world: World) -> None:
    prompt, eos = world.prompt("metformin"), world.tokenizer.convert_tokens_to_ids(TURN_END)
    [before] = await engine.generate(request(prompt, temperature=0.0))
    update = await engine.load_weights(world.new_file, version=2)
    [after] = await engine.generate(request(prompt, temperature=0.0))
    assert before.token_ids.tolist() == greedy(world.old, prompt, 24, eos)
    assert after.token_ids.tolist() == greedy(world.new, prompt, 24, eos)
    assert before.token_ids.tolist() != after.token_ids.tolist()
    check_shape(after, version=2)
    assert (update.version, engine.weight_version, update.tensors) == (2, 2, len(load_file(world.new_file)))
    assert 0 < update.stall_s <= update.total_s < 5


async def test_samples_differ_and_seeds_reproduce(engine: Engine, world: World) -> None:
    prompt = world.prompt("sleep")
    first = await engine.generate(request(prompt, n=8, seed=3))
    again = await engine.generate(request(prompt, n=8, seed=3))
    other = await engine.generate(request(prompt, n=8, seed=4))
    texts = [tuple(completion.token_ids.tolist()) for completion in (*first, *other)]
    assert len(set(texts)) == 16, "samples of one request, and of neighbouring seeds, must not repeat"
    assert [c.token_ids.tolist() for c in first] == [c.token_ids.tolist() for c in again]


async def test_logprobs_that_nobody_wants_change_nothing_else(engine: Engine, world: World) -> None:
    prompt = world.prompt("sleep")
    (wanted,) = await engine.generate(request(prompt))
    (unwanted,) = await engine.generate(request(prompt, logprobs=False))
    assert unwanted.token_ids.tolist() == wanted.token_ids.tolist()
    assert unwanted.spans == wanted.spans
    assert len(unwanted.logprobs) in (0, len(wanted.logprobs))


async def test_a_listener_hears_how_every_sample_grows(engine: Engine, world: World) -> None:
    heard: dict[int, list[str]] = {0: [], 1: []}
    loop = asyncio.get_running_loop()

    def listener(sample: int, text: str) -> None:
        assert asyncio.get_running_loop() is loop
        heard[sample].append(text)

    told = await engine.generate(request(world.prompt("sleep"), n=2, listener=listener))
    for completion, texts in zip(told, heard.values(), strict=True):
        assert texts[-1] == completion.text
        assert len(set(texts)) > 2
        assert all(after.startswith(before) for before, after in pairwise(texts))
    untold = await engine.generate(request(world.prompt("sleep"), n=2))
    for one, other in zip(told, untold, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert one.spans == other.spans
        np.testing.assert_array_equal(one.logprobs, other.logprobs)


async def test_without_a_seed_every_call_is_new(engine: Engine, world: World) -> None:
    drawn = [await engine.generate(request(world.prompt("sleep"), seed=None)) for _ in range(2)]
    assert drawn[0][0].token_ids.tolist() != drawn[1][0].token_ids.tolist()


async def test_a_sample_does_not_depend_on_its_batch(engine: Engine, world: World) -> None:
    [alone] = await engine.generate(request(world.prompt("trial"), seed=11, max_tokens=32))
    crowd = [request(world.prompt("x " * length), n=2, seed=length) for length in range(1, 16)]
    [together], *_ = await asyncio.gather(
        engine.generate(request(world.prompt("trial"), seed=11, max_tokens=32)),
        *(engine.generate(one) for one in crowd),
    )
    assert together.token_ids.tolist() == alone.token_ids.tolist()
    np.testing.assert_allclose(together.logprobs, alone.logprobs, atol=TOLERANCE)


async def test_many_requests_of_all_lengths(engine: Engine, world: World) -> None:
    requests = [
        request(world.prompt("query " * (i % 13)), n=1 + i % 3, max_tokens=1 + i % 17, seed=i, request_id=f"many-{i}")
        for i in range(64)
    ]
    before = engine.stats
    answers = await asyncio.gather(*(engine.generate(one) for one in requests))
    for one, completions in zip(requests, answers, strict=True):
        assert len(completions) == one.n
        for completion in completions:
            check_shape(completion, version=1)
            assert len(completion.token_ids) <= one.max_tokens
            assert completion.finish_reason == "stop" or len(completion.token_ids) == one.max_tokens
            logits = next_logits(world.old, list(one.prompt_ids), completion.token_ids)
            wanted = behaviour_logprobs(logits, completion.token_ids, 1.0, 1.0)
            np.testing.assert_allclose(completion.logprobs, wanted, atol=TOLERANCE)
    after = engine.stats
    tokens = sum(len(completion.token_ids) for completions in answers for completion in completions)
    assert after.generated_tokens - before.generated_tokens == tokens
    assert after.finished_requests - before.finished_requests == 64
    assert after.running_requests == 0
    assert after.busy_s > before.busy_s


async def test_a_burst_of_long_prompts(engine: Engine, world: World) -> None:
    """More prompt tokens at once than a forward pass takes, all of them seeded."""
    requests = [request(world.prompt(f"{i} " + "word " * 40), n=2, seed=i, max_tokens=4) for i in range(32)]
    assert sum(len(one.prompt_ids) for one in requests) > 4096
    answers = await asyncio.gather(*(engine.generate(one) for one in requests))
    for one, completions in zip(requests, answers, strict=True):
        for completion in completions:
            logits = next_logits(world.old, list(one.prompt_ids), completion.token_ids)
            wanted = behaviour_logprobs(logits, completion.token_ids, 1.0, 1.0)
            np.testing.assert_allclose(completion.logprobs, wanted, atol=TOLERANCE)


async def test_the_stop_string_ends_a_response_wherever_tokens_split_it(engine: Engine, world: World) -> None:
    prompt = world.prompt("statins")
    [free] = await engine.generate(request(prompt, max_tokens=64, seed=5))
    pieces = [world.tokenizer.decode([int(token)]) for token in free.token_ids]
    # A stop string made of the end of one token and the beginning of the next.
    at = next(
        i
        for i in range(4, len(pieces) - 1)
        if pieces[i].isascii()
        and pieces[i + 1].isascii()
        and len(pieces[i]) > 1
        and len(pieces[i + 1]) > 1
        and free.text.count(pieces[i][-1] + pieces[i + 1][0]) == 1
    )
    stop = pieces[at][-1] + pieces[at + 1][0]
    [stopped] = await engine.generate(request(prompt, max_tokens=64, seed=5, stop=stop))
    assert stopped.finish_reason == "stop"
    assert stopped.text == free.text[: free.text.index(stop) + len(stop)]
    assert stopped.token_ids.tolist() == free.token_ids[: at + 2].tolist()
    np.testing.assert_allclose(stopped.logprobs, free.logprobs[: at + 2], atol=TOLERANCE)
    check_shape(stopped, version=1)


async def test_a_pattern_holds_every_response(engine: Engine, world: World) -> None:
    task = load_task("publication_search")
    pattern, stop = regex.compile(task.answer_pattern), "</answer>"
    prompt = world.prompt("Does aspirin help?")
    free, *held = await asyncio.gather(
        engine.generate(request(prompt, n=4, max_tokens=60, stop=stop)),
        *(
            engine.generate(request(prompt, n=8, seed=seed, max_tokens=150, stop=stop, pattern=task.answer_pattern))
            for seed in (1, None)
        ),
    )
    assert not any(pattern.match(completion.text) for completion in free), "random weights write no answers"
    for completion in (completion for group in held for completion in group):
        check_shape(completion, version=1)
        assert np.isfinite(completion.logprobs).all()
        if completion.finish_reason == "stop":
            assert isinstance(task.parse(completion.text), ParsedAnswer)
        else:
            whole = completion.text.rstrip("\N{REPLACEMENT CHARACTER}")  # half a character at the cut
            assert pattern.fullmatch(whole, partial=True), completion.text


async def test_a_pattern_restricts_the_distribution(engine: Engine, world: World) -> None:
    prompt = world.prompt("Yes or no?")
    samples = await engine.generate(request(prompt, n=64, pattern="[XY]"))
    mass = {completion.text: float(np.exp(completion.logprobs[0])) for completion in samples}
    assert set(mass) == {"X", "Y"}
    assert sum(mass.values()) == pytest.approx(1.0, abs=1e-4)


async def test_a_pattern_that_is_none_is_refused_and_others_go_on(engine: Engine, world: World) -> None:
    prompt = world.prompt("Yes or no?")
    with pytest.raises(ValueError, match=r"\("):
        await engine.generate(request(prompt, pattern="(a"))
    assert len(await engine.generate(request(prompt))) == 1


async def test_the_end_of_sequence_token_is_kept_but_not_shown(engine: Engine, world: World) -> None:
    eos = world.tokenizer.convert_tokens_to_ids(TURN_END)
    completions = await engine.generate(request(world.prompt("b"), n=32, temperature=2.0, max_tokens=160))
    ended = [completion for completion in completions if completion.finish_reason == "stop"]
    assert 0 < len(ended) < 32
    for completion in completions:
        assert (completion.token_ids[-1] == eos) == (completion.finish_reason == "stop")
        assert eos not in completion.token_ids[:-1]
        assert TURN_END not in completion.text


async def test_weights_change_in_flight_and_the_kv_cache_stays(engine: Engine, world: World) -> None:
    prompt = world.prompt("heart failure in adults")
    running = asyncio.create_task(engine.generate(request(prompt, n=4, max_tokens=200)))
    await asyncio.sleep(0.15)
    await engine.load_weights(world.new_file, version=2)
    completions = await running
    across = [completion for completion in completions if len(completion.spans) == 2]
    assert across, "the update came before the first or after the last token"
    for completion in completions:
        check_shape(completion)
        assert completion.finish_reason == "stop" or len(completion.token_ids) == 200, "tokens were dropped"
    for completion in across:
        assert [span.version for span in completion.spans] == [1, 2]
        swap, tokens = completion.spans[1].start, completion.token_ids
        old = next_logits(world.old, prompt, tokens)[:swap]
        new = next_logits_after_swap(world.old, world.new, prompt, tokens, swap)
        wanted = behaviour_logprobs(np.concatenate([old, new]), tokens, 1.0, 1.0)
        np.testing.assert_allclose(completion.logprobs, wanted, atol=TOLERANCE)


async def test_many_updates_leave_exact_weights(engine: Engine, world: World) -> None:
    prompt, eos = world.prompt("dose"), world.tokenizer.convert_tokens_to_ids(TURN_END)
    background = asyncio.create_task(engine.generate(request(prompt, n=8, max_tokens=200)))
    for version in range(2, 13):
        await engine.load_weights(world.new_file if version % 2 else world.old_file, version=version)
    for completion in await background:
        check_shape(completion)
        versions = [span.version for span in completion.spans]
        assert versions == sorted(set(versions))
    [last] = await engine.generate(request(prompt, temperature=0.0))
    assert last.token_ids.tolist() == greedy(world.old, prompt, 24, eos)
    check_shape(last, version=12)


async def test_weights_of_another_model_are_refused_and_the_old_ones_stay(
    engine: Engine, world: World, tmp_path: Path
) -> None:
    tensors = load_file(world.new_file)
    missing, cut = tmp_path / "missing.safetensors", tmp_path / "cut.safetensors"
    save_file({name: tensor for name, tensor in tensors.items() if "layers.1.mlp.up_proj" not in name}, missing)
    cut.write_bytes(world.new_file.read_bytes()[:-100])
    with pytest.raises(EngineError, match=r"layers\.1\.mlp\.up_proj\.weight is missing"):
        await engine.load_weights(missing, version=2)
    with pytest.raises(EngineError, match="bytes instead of"):
        await engine.load_weights(cut, version=2)
    with pytest.raises(EngineError, match="cannot read the weights"):
        await engine.load_weights(tmp_path / "nowhere.safetensors", version=2)
    prompt, eos = world.prompt("dose"), world.tokenizer.convert_tokens_to_ids(TURN_END)
    [completion] = await engine.generate(request(prompt, temperature=0.0))
    assert completion.token_ids.tolist() == greedy(world.old, prompt, 24, eos)
    check_shape(completion, version=1)


async def test_a_prompt_that_does_not_fit_is_refused(engine: Engine, world: World) -> None:
    with pytest.raises(ValueError, match=r"exceed actor\.max_model_len=256"):
        await engine.generate(request(world.prompt("word " * 100), max_tokens=200))


async def test_a_cancelled_request_frees_its_place(engine: Engine, world: World) -> None:
    running = asyncio.create_task(engine.generate(request(world.prompt("long"), n=8, max_tokens=220)))
    await asyncio.sleep(0.05)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert engine.stats.running_requests == 0
    [completion] = await asyncio.wait_for(engine.generate(request(world.prompt("next"))), timeout=30)
    check_shape(completion, version=1)


@pytest.mark.parametrize(
    ("dtype", "tied", "tolerance"),
    [("float32", False, TOLERANCE), ("bfloat16", True, 0.25)],
    ids=["untied", "bfloat16"],
)
async def test_updates_of_other_kinds_of_models(
    engine_name: EngineName, tmp_path: Path, dtype: Any, tied: bool, tolerance: float
) -> None:
    old, new = (build_tiny_model(tmp_path / str(seed), seed=seed, tied=tied) for seed in (0, 1))
    engine = create_engine(engine_name, EngineOptions(dtype=dtype, max_model_len=MAX_MODEL_LEN, max_sequences=8))
    await engine.start(old, version=0)
    try:
        for version, folder in ((0, old), (1, new), (2, old)):
            if version > 0:
                await engine.load_weights(folder / "model.safetensors", version)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval().float()
            completions = await engine.generate(request([5, 6, 7, 8], n=4))
            for completion in completions:
                check_shape(completion, version)
                logits = next_logits(model, [5, 6, 7, 8], completion.token_ids)
                wanted = behaviour_logprobs(logits, completion.token_ids, 1.0, 1.0)
                np.testing.assert_allclose(completion.logprobs, wanted, atol=tolerance)
    finally:
        await engine.close()
