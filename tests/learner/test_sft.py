"""The supervised warm start learns the answers, all of them and nothing else, and leaves a plain model."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("trl", reason="the extra `sft` is not installed")

from actors.prompts import chat_encoder
from common.data.demonstrations import Demonstration, read_demonstrations
from common.data.worlds.sql import build_world
from common.messages import ChatMessage
from common.tasks import Task, load_task
from learner.adapters import LoraSettings
from learner.sft import Example, SftSettings, encode, fine_tune, rows_per_pass

TASK = load_task("text_to_sql", prompt="short", reasoning=False)
SETTINGS = SftSettings(epochs=3, lr=3e-3, batch=4)


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> list[Demonstration]:
    world = build_world(tmp_path_factory.mktemp("sql") / "world", databases=3, heldout_databases=1, questions=4)
    return read_demonstrations(world / "rows" / "train.jsonl", TASK)


@pytest.fixture
def examples(demonstrations: list[Demonstration], model_dir: Path) -> list[Example]:
    return encode(demonstrations, model_dir, "")


def mean_loss(model: Any, examples: list[Example]) -> float:
    """Cross-entropy per answer token, computed row by row."""
    total = 0.0
    for example in examples:
        ids = torch.tensor([example.prompt + example.answer])
        with torch.no_grad():
            logprobs = model(input_ids=ids).logits.log_softmax(-1)
        places = torch.arange(len(example.prompt) - 1, ids.shape[1] - 1)
        total -= float(logprobs[0, places, ids[0, places + 1]].sum())
    return total / sum(len(example.answer) for example in examples)


def plain(model_dir: Path, weights: dict[str, torch.Tensor] | None = None) -> Any:
    """The model of a folder, or what became of it."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    if weights is not None:
        assert weights.keys() == dict(model.named_parameters()).keys()
        model.load_state_dict(weights, strict=False)
    return model


@pytest.mark.parametrize("task", [TASK, load_task("text_to_sql", prefill=True)], ids=["short", "prefill"])
def test_a_prompt_has_the_tokens_that_an_actor_sends(
    demonstrations: list[Demonstration], model_dir: Path, task: Task
) -> None:
    sent = chat_encoder(model_dir, task.response_prefix)
    encoded = encode(demonstrations, model_dir, task.response_prefix)
    for demonstration, example in zip(demonstrations, encoded, strict=True):
        assert example.prompt == sent([ChatMessage(**message) for message in demonstration.messages])


def test_an_answer_ends_with_the_token_that_ends_a_text(demonstrations: list[Demonstration], model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    example = encode(demonstrations[:1], model_dir, "")[0]
    assert tokenizer.decode(example.answer) == demonstrations[0].answer + tokenizer.eos_token


def test_a_model_without_chat_template_is_refused(
    demonstrations: list[Demonstration], model_dir: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="chat template"):
        encode(demonstrations, tmp_path, "")


def test_the_loss_falls_and_is_that_of_the_weights_given_back(examples: list[Example], model_dir: Path) -> None:
    weights, losses = fine_tune(model_dir, examples, SETTINGS)
    assert len(losses) == 3 * math.ceil(len(examples) / 4)
    after, before = mean_loss(plain(model_dir, weights), examples), mean_loss(plain(model_dir), examples)
    assert after < 0.7 * before
    assert sum(losses[-3:]) / 3 == pytest.approx(after, rel=0.2)


def test_only_the_tokens_of_answers_count(examples: list[Example], model_dir: Path) -> None:
    """The loss before the first update, of one batch that is the whole set, rows of unequal length."""
    assert len({example.tokens for example in examples}) > 1
    _, losses = fine_tune(model_dir, examples, replace(SETTINGS, epochs=1, batch=len(examples)))
    assert losses == [pytest.approx(mean_loss(plain(model_dir), examples), rel=1e-4)]


def test_the_size_of_a_forward_pass_changes_nothing(examples: list[Example], model_dir: Path) -> None:
    _, whole = fine_tune(model_dir, examples, SETTINGS)
    _, single = fine_tune(model_dir, examples, replace(SETTINGS, micro_batch_tokens=1))
    assert single == pytest.approx(whole, rel=1e-3)


def test_equal_seeds_give_equal_models(examples: list[Example], model_dir: Path) -> None:
    first, again, other = (
        fine_tune(model_dir, examples, replace(SETTINGS, epochs=1, seed=seed))[0] for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("lora", [None, LoraSettings(4, 8.0)], ids=["all weights", "adapters"])
def test_less_memory_is_the_same_training(examples: list[Example], model_dir: Path, lora: LoraSettings | None) -> None:
    """Layers computed again change nothing; bfloat16 rounds."""
    settings = replace(SETTINGS, lora=lora, lr=SETTINGS.lr if lora is None else 2e-2)
    _, plainly = fine_tune(model_dir, examples, settings)
    _, sparing = fine_tune(model_dir, examples, replace(settings, activation_checkpointing=True))
    _, rounded = fine_tune(model_dir, examples, replace(settings, compute_dtype="bfloat16"))
    assert sparing == pytest.approx(plainly, rel=1e-4)
    assert rounded == pytest.approx(plainly, rel=0.05)
    assert rounded != plainly


def test_adapters_are_added_in(examples: list[Example], model_dir: Path) -> None:
    """The weights given back are plain ones, have learned, and differ where adapters were."""
    weights, _ = fine_tune(model_dir, examples, replace(SETTINGS, lr=2e-2, lora=LoraSettings(4, 8.0)))
    base = plain(model_dir)
    assert mean_loss(plain(model_dir, weights), examples) < 0.9 * mean_loss(base, examples)
    before = dict(base.named_parameters())
    changed = {name for name in before if not torch.equal(before[name], weights[name])}
    assert changed == {name for name in before if "_proj.weight" in name}


@pytest.mark.parametrize(
    ("longest", "tokens", "batch", "rows"), [(100, 1000, 16, 8), (100, 50, 16, 1), (10, 1000, 6, 6), (100, 700, 12, 6)]
)
def test_rows_of_a_forward_pass_divide_the_batch(longest: int, tokens: int, batch: int, rows: int) -> None:
    examples = [Example([1] * (longest - 1), [2]), Example([1], [2])]
    assert rows_per_pass(examples, SftSettings(batch=batch, micro_batch_tokens=tokens)) == rows


def test_a_loss_that_is_no_number_ends_it(examples: list[Example], model_dir: Path) -> None:
    with pytest.raises(FloatingPointError, match="lower --lr"):
        fine_tune(model_dir, examples, replace(SETTINGS, epochs=5, lr=1e30))
