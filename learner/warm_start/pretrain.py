"""Supervised training of a small Qwen2 model on format and copying, until it copies well or its budget is spent."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from learner.warm_start.examples import Example, Sampler
from learner.warm_start.tokenizer import MAX_MODEL_LENGTH

_LONGEST_ANSWER = 40  # tokens generated when checking
_SORTED_BATCHES = 16  # this many batches are drawn at once and sorted by length, so that little is padding

Progress = Callable[[float, str], None]
"""Called with the share of the work done, in [0, 1], and a few words on what is going on."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Size of the model; the default has 0.95M parameters with 4,096 tokens."""

    layers: int = 2
    width: int = 128
    heads: int = 4
    feed_forward: int = 384


@dataclass(frozen=True, slots=True)
class Budget:
    """When pretraining stops.

    `steps` and `copy_target` decide, so that a seed gives the same model on a slower machine; `seconds` is the safety
    net above them.
    """

    steps: int = 3000
    seconds: float = 600.0
    copy_target: float = 0.97  # share of freely sampled answers that are well-formed and copy only words of the prompt
    check_every: int = 100


@dataclass(frozen=True, slots=True)
class Outcome:
    """What pretraining came to.

    Attributes:
        clean_copies: copy score (see `copy_score`) of the last check, 0 where there was none.
        steps: how many were done.
        cut_short: the time limit ended it, so that another machine makes another model.
    """

    clean_copies: float
    steps: int
    cut_short: bool


@dataclass(frozen=True, slots=True)
class Schedule:
    """Optimiser settings."""

    learning_rate: float = 3e-3
    warmup_steps: int = 50
    final_steps: int = 200  # linear decay to a tenth, only once copying works: decaying earlier prevents it
    batch: int = 64
    weight_decay: float = 0.01
    clip: float = 1.0


def new_model(tokenizer: PreTrainedTokenizerFast, shape: ModelShape, seed: int) -> Qwen2ForCausalLM:
    """A randomly initialised model, fp32, whose embedding is tied: copying is then close to an identity map."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=shape.width,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=MAX_MODEL_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(config)


def pretrain(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    sampler: Sampler,
    *,
    seed: int,
    budget: Budget | None = None,
    schedule: Schedule | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Train the model in place.

    The learning rate is constant after a short warm-up, because copying appears suddenly and late (at some 1.5M tokens)
    and not at all once the rate has decayed; when the target is met, a short linear decay finishes the training.
    """
    budget, schedule = budget or Budget(), schedule or Schedule()
    rng = random.Random(seed)
    optimizer = _optimizer(model, schedule)
    batches = _Batches(sampler, rng, schedule.batch, int(tokenizer.pad_token_id))
    started, score, last_step = time.monotonic(), 0.0, budget.steps
    step = 0
    while step < last_step and time.monotonic() - started < budget.seconds:
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate * _rate(step, last_step, schedule)
        loss = _step(model, optimizer, batches.next(_random_words(step)), schedule.clip)
        step += 1
        if step % budget.check_every == 0 or step == last_step:
            score = copy_score(model, tokenizer, sampler, seed=seed)
            if score >= budget.copy_target:
                last_step = min(last_step, step + schedule.final_steps)
            if progress is not None:
                done = max(step / last_step, (time.monotonic() - started) / budget.seconds)
                progress(min(done, 1.0), f"step {step}, loss {loss:.2f}, clean copies {score:.0%}")
    return Outcome(score, step, cut_short=step < last_step)


@torch.inference_mode()
def copy_score(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    sampler: Sampler,
    *,
    seed: int,
    samples: int = 128,
) -> float:
    """Share of answers, sampled at temperature 1 for random requests, that are clean (`Sampler.is_clean`)."""
    rng = random.Random(seed + 1)
    sources = [sampler.sources[rng.randrange(len(sampler.sources))] for _ in range(samples)]
    width = max(len(source.prompt) for source in sources)
    padding = int(tokenizer.pad_token_id)
    ids = torch.tensor([[padding] * (width - len(s.prompt)) + s.prompt for s in sources])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokens = model.generate(
            ids,
            attention_mask=(ids != padding).long(),
            do_sample=True,
            top_k=0,
            max_new_tokens=_LONGEST_ANSWER,
            pad_token_id=padding,
        )
    answers = tokenizer.batch_decode(tokens[:, width:], skip_special_tokens=True)
    clean = [sampler.is_clean(answer, source) for answer, source in zip(answers, sources, strict=True)]
    return sum(clean) / len(clean)


class _Batches:
    """Endless batches of like-length examples; prompts of random tokens grow longer as training goes on."""

    def __init__(self, sampler: Sampler, rng: random.Random, size: int, padding: int) -> None:
        self._sampler, self._rng, self._size, self._padding = sampler, rng, size, padding
        self._ready: list[list[Example]] = []

    def next(self, longest_random_prompt: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids, int64 [batch, length] padded on the right, and which of them to learn, bool [batch, length]."""
        if not self._ready:
            drawn = [self._sampler.draw(self._rng, longest_random_prompt) for _ in range(self._size * _SORTED_BATCHES)]
            drawn.sort(key=lambda example: len(example.prompt) + len(example.response))
            self._ready = [drawn[i : i + self._size] for i in range(0, len(drawn), self._size)]
            self._rng.shuffle(self._ready)
        return _collate(self._ready.pop(), self._padding)


def _collate(examples: Sequence[Example], padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(e.prompt) + len(e.response) for e in examples)
    ids = torch.full((len(examples), width), padding)
    learn = torch.zeros(len(examples), width, dtype=torch.bool)
    for row, example in enumerate(examples):
        start, end = len(example.prompt), len(example.prompt) + len(example.response)
        ids[row, :end] = torch.tensor(example.prompt + example.response)
        learn[row, start:end] = True
    return ids, learn


def _step(
    model: Qwen2ForCausalLM,
    optimizer: torch.optim.Optimizer,
    batch: tuple[torch.Tensor, torch.Tensor],
    clip: float,
) -> float:
    ids, learn = batch
    # No attention mask: padding stands on the right, where causal attention never looks.
    hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state
    # The output matrix is half of all parameters: multiply it only where a token is learned.
    logits = model.lm_head(hidden[learn[:, 1:]])
    loss = F.cross_entropy(logits, ids[:, 1:][learn[:, 1:]])
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return float(loss.detach())


def _random_words(step: int) -> int:
    """Most words in a prompt of random tokens: short prompts first, where the word to copy is found sooner."""
    return min(24, 8 + step // 50)


def _optimizer(model: Qwen2ForCausalLM, schedule: Schedule) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": schedule.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=(0.9, 0.98), fused=True)


def _rate(step: int, last_step: int, schedule: Schedule) -> float:
    """Factor on the learning rate: linear warm-up, constant, and a linear fall to a tenth over the final steps."""
    warm = min(1.0, (step + 1) / schedule.warmup_steps)
    left = min(1.0, (last_step - step) / schedule.final_steps)
    return warm * (0.1 + 0.9 * left)
