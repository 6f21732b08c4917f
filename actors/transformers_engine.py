"""The transformers engine: ``model.generate`` in a thread of its own, for machines without vLLM.

Requests are cut into rows (one per sample), rows into batches; each batch is one call of ``generate``. The
sampling, the stop string and the weight swap hang on two hooks that ``generate`` offers, see
``transformers_sampling``.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.engine import (
    Completion,
    Engine,
    EngineDiedError,
    EngineError,
    EngineOptions,
    GenerationRequest,
    WeightUpdate,
)
from actors.guided_decoding import PatternCompiler, guide_of
from actors.transformers_sampling import Group, IncrementalText, Progress, Row, Sampler
from actors.weight_file import OUTPUT_HEAD, Shapes, check_same_model, read_model_shapes, read_weight_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

GATHER_S = 0.005  # how long the first request of a batch waits for company


class TransformersEngine(Engine):
    """Batches of ``generate`` with the same guarantees as the vLLM engine, and none of its speed-ups."""

    name = "transformers"

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options)
        self._generator: _Generator | None = None

    async def prepare(self) -> None:
        """Imports transformers in a thread."""
        await asyncio.to_thread(__import__, "transformers")

    async def start(self, model_dir: Path, version: int) -> None:
        """See ``Engine.start``."""
        shapes = await asyncio.to_thread(read_model_shapes, model_dir)
        self._generator = _Generator(model_dir, version, shapes, self.options)
        self._generator.start()
        await asyncio.wrap_future(self._generator.ready)
        self.weight_version = version

    async def generate(self, request: GenerationRequest) -> list[Completion]:
        """See ``Engine.generate``."""
        self._check_length(request)
        grammar = await asyncio.to_thread(self._running.compile, request.pattern) if request.pattern else None
        group = Group.of(_told_on_this_loop(request), grammar)
        self._meter.begin()
        completions: list[Completion] = []
        try:
            self._running.submit(group)
            completions = await asyncio.wrap_future(group.done)
        finally:
            self._meter.end(completions)
        return completions

    async def problem(self) -> str | None:
        """See ``Engine.problem``."""
        alive = self._generator is not None and self._generator.is_alive()
        return None if alive else "the transformers engine is not running"

    async def load_weights(self, weights: Path, version: int) -> WeightUpdate:
        """See ``Engine.load_weights``."""
        return await asyncio.shield(asyncio.ensure_future(self._load_weights(weights, version)))

    async def _load_weights(self, weights: Path, version: int) -> WeightUpdate:
        begin = time.perf_counter()
        generator = self._running
        file = await asyncio.to_thread(read_weight_file, weights)
        check_same_model(file, generator.shapes)
        swap = _Swap(await asyncio.to_thread(_read_tensors, weights), version)
        generator.submit(swap)
        stall_s = await asyncio.wrap_future(swap.done)
        self.weight_version = version
        self._meter.stalled(stall_s)
        return WeightUpdate(version, len(file.shapes), file.bytes, stall_s, time.perf_counter() - begin)

    async def close(self) -> None:
        """See ``Engine.close``."""
        if self._generator is not None:
            self._generator.stop()
            await asyncio.to_thread(self._generator.join)

    @property
    def _running(self) -> _Generator:
        if self._generator is None:
            raise EngineDiedError("the transformers engine is not running: start it first")
        return self._generator


def _told_on_this_loop(request: GenerationRequest) -> GenerationRequest:
    """The request with a listener that the generator's thread may call."""
    listener = request.listener
    if listener is None:
        return request
    loop = asyncio.get_running_loop()

    def told(sample: int, text: str) -> None:
        loop.call_soon_threadsafe(listener, sample, text)

    return replace(request, listener=told)


@dataclass
class _Swap:
    """Weights that wait to be copied into the model between two tokens."""

    tensors: dict[str, Tensor]
    version: int
    done: Future[float] = field(default_factory=Future)  # seconds of the copy


class _Generator(threading.Thread):
    """The thread that owns the model."""

    def __init__(self, model_dir: Path, version: int, shapes: Shapes, options: EngineOptions) -> None:
        super().__init__(name="transformers-engine", daemon=True)
        self.shapes = shapes
        self.ready: Future[None] = Future()
        self.version = version
        self._model_dir = model_dir
        self._options = options
        self._inbox: queue.SimpleQueue[Group | _Swap | None] = queue.SimpleQueue()
        self._waiting: list[Row] = []
        self._batch: list[Row] = []
        self._stopped = threading.Event()
        self._failure: Exception | None = None

    def submit(self, work: Group | _Swap) -> None:
        """Queues a request or a weight swap; from any thread."""
        self._inbox.put(work)
        if self._stopped.is_set():
            self._fail_all()

    def compile(self, pattern: str) -> Any:
        """See ``PatternCompiler.compile``; from any thread, once ``ready``."""
        return self._patterns.compile(pattern)

    def stop(self) -> None:
        """Ends the thread at the next token."""
        self._stopped.set()
        self._inbox.put(None)

    def run(self) -> None:
        """Generates batch after batch until ``stop``."""
        try:
            torch.set_num_threads(self._options.threads)
            self._load()
        except Exception as error:
            self._stopped.set()
            self.ready.set_exception(EngineError(f"transformers could not load {self._model_dir}: {error}"))
            return
        self.ready.set_result(None)
        try:
            while not self._stopped.is_set():
                self._await_work()
                self._batch = self._next_batch()
                if self._batch:
                    self._generate(self._batch)
        except Exception as error:
            self._failure = error
        self._stopped.set()
        self._fail_all()

    def _load(self) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = getattr(torch, self._options.dtype)
        self._tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(self._model_dir)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(self._model_dir, dtype=dtype)
        self._model = model.to(device).eval()
        self._eos_ids = _eos_ids(self._model, self._tokenizer)
        pad_id = self._tokenizer.pad_token_id
        self._pad_id: int = self._eos_ids[0] if pad_id is None else pad_id
        # The model's own defaults (repetition penalty, top-k, …) would change the distribution sampled from.
        self._model.generation_config = GenerationConfig()
        self._patterns = PatternCompiler(self._tokenizer, self._vocabulary, self._eos_ids)

    def _await_work(self) -> None:
        """Returns once there is something to generate, or to stop."""
        if not self._waiting:
            self._accept(self._inbox.get())
            if self._waiting:
                time.sleep(GATHER_S)
        self._accept_arrived()

    def _accept_arrived(self) -> None:
        with suppress(queue.Empty):
            while True:
                self._accept(self._inbox.get_nowait())

    def _accept(self, work: Group | _Swap | None) -> None:
        if isinstance(work, _Swap):
            self._swap(work)
        elif work is not None:
            self._waiting.extend(work.rows)

    def _next_batch(self) -> list[Row]:
        """A seeded request is a batch of its own: its samples then do not depend, even in their last bits, on what
        else there happens to be."""
        waiting = [row for row in self._waiting if not row.group.done.cancelled()]
        if waiting and waiting[0].group.request.seed is not None:
            company = [row for row in waiting if row.group is waiting[0].group]
        else:
            company = [row for row in waiting if row.group.request.seed is None]
        batch = company[: self._options.max_sequences]
        taken = set(map(id, batch))
        self._waiting = [row for row in waiting if id(row) not in taken]
        return batch

    def _generate(self, rows: list[Row]) -> None:
        """One call of ``generate``: prompts of all rows padded on the left to [B, P]."""
        for row in rows:
            row.text = IncrementalText(self._tokenizer, row.group.request.prompt_ids)
        ids, mask = _left_padded([row.group.request.prompt_ids for row in rows], self._pad_id, self._model.device)
        guide = guide_of([row.group.grammar for row in rows], self._vocabulary)
        sampler = Sampler(rows, self._model.device, guide)
        progress = Progress(rows, sampler, self._eos_ids, self._between_tokens, self.version)
        with torch.inference_mode():
            self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max(row.group.request.max_tokens for row in rows),
                do_sample=False,  # the sampler leaves one token per row to choose from
                pad_token_id=self._pad_id,
                logits_processor=[sampler],
                stopping_criteria=[progress],
            )

    @property
    def _vocabulary(self) -> int:
        return int(self._model.config.vocab_size)

    def _between_tokens(self) -> int | None:
        self._accept_arrived()
        return None if self._stopped.is_set() else self.version

    def _swap(self, swap: _Swap) -> None:
        begin = time.perf_counter()
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, tensor in swap.tensors.items():
                if name != OUTPUT_HEAD or name in self.shapes:
                    parameters[name].copy_(tensor)
        self.version = swap.version
        swap.done.set_result(time.perf_counter() - begin)

    def _fail_all(self) -> None:
        """Fails everything that waits, so that no caller hangs."""
        cause = f"failed: {self._failure!r}; restart this actor" if self._failure else "was closed"
        waiting: list[Future[Any]] = [row.group.done for row in (*self._batch, *self._waiting)]
        with suppress(queue.Empty):
            while True:
                work = self._inbox.get_nowait()
                if work is not None:
                    waiting.append(work.done)
        for future in waiting:
            with suppress(InvalidStateError):  # it has its result, or was cancelled
                future.set_exception(EngineDiedError(f"the transformers engine {cause}"))


def _left_padded(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask, int64 [B, P] each; padding in front."""
    width = max(len(prompt) for prompt in prompts)
    ids: NDArray[np.int64] = np.full((len(prompts), width), pad_id, dtype=np.int64)
    mask: NDArray[np.int64] = np.zeros((len(prompts), width), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """All ids that end a sequence, as generation config, config and tokenizer name them."""
    ids: set[int] = set()
    for source in (model.generation_config, model.config, tokenizer):
        value = getattr(source, "eos_token_id", None)
        ids.update(value if isinstance(value, list | tuple) else [] if value is None else [value])
    if not ids:
        raise EngineError("neither the model nor its tokenizer names an end-of-sequence token")
    return sorted(ids)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = load_file(path)
    return tensors
