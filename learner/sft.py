"""Supervised warm start from demonstrations: cross-entropy on the answers, by TRL's SFTTrainer.

DeepRetrieval (arXiv 2503.00223) began its SQL runs so. Prompts and answers become the very tokens that an actor
sends and a model should generate: the chat template with its generation prompt, then the answer and the token that ends
it. They are encoded apart, so that no token reaches over the border, and TRL is given tokens, not texts.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging as transformers_logging
from trl import SFTConfig, SFTTrainer

from common.data.demonstrations import Demonstration
from learner.adapters import LoraSettings, add_adapters, find_adapters, merge, original_name
from learner.sharding import COMPUTE_DTYPES

NO_LOSS = -100  # the label that transformers leaves out of the loss
_WARMUP = 0.03  # share of the steps

Progress = Callable[[float, str], None]
"""Called with the share of the work done, in [0, 1], and a few words on what is going on."""


@dataclass(frozen=True)
class SftSettings:
    """How to learn from demonstrations.

    Attributes:
        epochs: passes over all rows.
        lr: peak learning rate of AdamW, after a short linear warm-up; cosine to 0.
        batch: rows per optimizer step.
        micro_batch_tokens: tokens per forward pass, padding included; it changes memory and speed, not the result.
        compute_dtype: "float32" or "bfloat16"; trained weights are float32 either way.
        activation_checkpointing: keep only the input of each layer for the backward pass.
        lora: train adapters only, and add them in at the end; None trains all weights.
        seed: of the order of the rows, and of the adapters.
    """

    epochs: float = 2.0
    lr: float = 1e-5
    batch: int = 16
    micro_batch_tokens: int = 16384
    compute_dtype: str = "float32"
    activation_checkpointing: bool = False
    lora: LoraSettings | None = None
    seed: int = 0


@dataclass(frozen=True)
class Example:
    """Token ids of a prompt and of its answer, which ends with the end-of-text token."""

    prompt: list[int]
    answer: list[int]

    @property
    def tokens(self) -> int:
        """Length of both."""
        return len(self.prompt) + len(self.answer)


def encode(demonstrations: Sequence[Demonstration], model_dir: Path, response_prefix: str) -> list[Example]:
    """Demonstrations as the tokens of the model in ``model_dir``.

    Args:
        response_prefix: the beginning of the answer, which is part of the prompt (``Task.response_prefix``).

    Raises:
        ValueError: the tokenizer has no chat template, or no end-of-text token.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    if tokenizer.chat_template is None or tokenizer.eos_token_id is None:
        lacks = "chat template" if tokenizer.chat_template is None else "eos_token"
        raise ValueError(f"the tokenizer in {model_dir} has no {lacks}: start from a model that was tuned for chat")
    chats = [each.messages for each in demonstrations]
    texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    prompts = tokenizer([text + response_prefix for text in texts], add_special_tokens=False)["input_ids"]
    answers = tokenizer([each.answer for each in demonstrations], add_special_tokens=False)["input_ids"]
    return [Example(prompt, [*answer, tokenizer.eos_token_id]) for prompt, answer in zip(prompts, answers, strict=True)]


def fine_tune(
    model_dir: Path,
    examples: Sequence[Example],
    settings: SftSettings,
    progress: Progress = lambda share, text: None,
) -> tuple[dict[str, Tensor], list[float]]:
    """Train the model in ``model_dir`` on ``examples``.

    Returns:
        The weights by the names they have in ``model_dir``, on the CPU, with adapters added in; and the loss of every
        optimizer step: mean over the answer tokens of its batch, in nats.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    transformers_logging.disable_progress_bar()
    model = _trainable(model_dir, settings)
    watch = _Watch(progress)
    with tempfile.TemporaryDirectory() as unused:
        trainer = SFTTrainer(
            model,
            args=_arguments(examples, settings, unused),
            train_dataset=Dataset.from_list([_row(example) for example in examples]),
            processing_class=AutoTokenizer.from_pretrained(model_dir, local_files_only=True),
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return {name: weight.cpu() for name, weight in _merged(trainer.model)}, watch.losses


def _trainable(model_dir: Path, settings: SftSettings) -> Any:
    held = torch.float32 if settings.lora is None else COMPUTE_DTYPES[settings.compute_dtype]
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=held, local_files_only=True, use_safetensors=True)
    if settings.lora is not None:
        add_adapters(model, settings.lora, settings.seed)
    return model


def _row(example: Example) -> dict[str, list[int]]:
    return {
        "input_ids": example.prompt + example.answer,
        "labels": [NO_LOSS] * len(example.prompt) + example.answer,
    }


def _arguments(examples: Sequence[Example], settings: SftSettings, folder: str) -> SFTConfig:
    rows = rows_per_pass(examples, settings)
    steps = math.ceil(len(examples) / settings.batch) * settings.epochs
    on_gpu = torch.cuda.is_available()
    return SFTConfig(
        output_dir=folder,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=settings.batch // rows,
        learning_rate=settings.lr,
        lr_scheduler_type="cosine",
        warmup_steps=round(_WARMUP * steps),
        seed=settings.seed,
        use_cpu=not on_gpu,
        bf16=settings.compute_dtype == "bfloat16",
        gradient_checkpointing=settings.activation_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        max_length=None,  # what is too long has been left out, not cut
        dataset_kwargs={"skip_prepare_dataset": True},
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        logging_nan_inf_filter=False,  # else a loss that is no number is reported as 0
        disable_tqdm=True,
    )


def rows_per_pass(examples: Sequence[Example], settings: SftSettings) -> int:
    """Rows per forward pass: the largest divisor of the batch whose rows fit, were all as long as the longest."""
    longest = max(example.tokens for example in examples)
    fitting = min(settings.batch, max(1, settings.micro_batch_tokens // longest))
    return next(rows for rows in range(fitting, 0, -1) if settings.batch % rows == 0)


def _merged(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The weights by the names the model had before adapters were added, with the adapters added in."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    adapters = find_adapters(model)
    added = {name for adapter in adapters.values() for name in (adapter.down, adapter.up)}
    for name, weight in parameters.items():
        if name in adapters:
            adapter = adapters[name]
            weight = merge(weight, parameters[adapter.down], parameters[adapter.up], adapter.scale)
        if name not in added:
            yield original_name(name), weight


class _Watch(TrainerCallback):
    """Collects losses, reports progress, and ends what has gone astray."""

    def __init__(self, progress: Progress) -> None:
        self.losses: list[float] = []
        self._progress = progress

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Called by the trainer after every step, and once at the end with totals."""
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss of step {state.global_step} is {loss}: lower --lr")
        self.losses.append(float(loss))
        self._progress(state.global_step / state.max_steps, f"step {state.global_step}, loss {loss:.3f}")
