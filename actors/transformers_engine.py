"""The transformers engine: ``model.generate`` in a thread of its own, for machines without vLLM.

Requests are cut into rows (one per sample), rows into batches; each batch is one call of ``generate``. The
sampling, the stop string and the weight swap hang on two hooks that ``generate`` offers: a logits processor
(``_Sampler``) before each token and a stopping criterion (``_Progress``) after it.
"""

from __future__ import annotations

import asyncio
import itertools
import queue
import secrets
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers.decoders import DecodeStream
from torch import Tensor

from actors.engine import (
    Completion,
    Engine,
    EngineDiedError,
    EngineError,
    EngineOptions,
    GenerationRequest,
    WeightUpdate,
    mix_seed,
)
from actors.weight_file import OUTPUT_HEAD, check_same_model, read_model_shapes, read_weight_file
from common.messages import WeightSpan

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
        group = _Group.of(request)
        self._meter.begin()
        completions: list[Completion] = []
        try:
            self._running.submit(group)
            completions = await asyncio.wrap_future(group.done)
        finally:
            self._meter.end(completions)
        return completions

    async def load_weights(self, weights: Path, version: int) -> WeightUpdate:
        """See ``Engine.load_weights``."""
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


@dataclass
class _Swap:
    """Weights that wait to be copied into the model between two tokens."""

    tensors: dict[str, Tensor]
    version: int
    done: Future[float] = field(default_factory=Future)  # seconds of the copy


@dataclass
class _Row:
    """One sample while it is generated."""

    group: _Group
    index: int
    stream_seed: int
    text: _IncrementalText | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None
    spans: tuple[WeightSpan, ...] = ()

    def take(self, token_id: int, logprob: float, is_eos: bool) -> None:
        """Appends a token and decides whether it was the last one."""
        assert self.text is not None
        request = self.group.request
        self.token_ids.append(token_id)
        self.logprobs.append(logprob)
        if self.text.push(token_id, request.stop) or is_eos:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= request.max_tokens:
            self.finish_reason = "length"

    def completion(self) -> Completion:
        assert self.text is not None
        assert self.finish_reason is not None
        return Completion(
            np.asarray(self.token_ids, dtype=np.int32),
            np.asarray(self.logprobs, dtype=np.float32),
            self.text.text,
            self.finish_reason,
            self.spans,
        )


@dataclass
class _Group:
    """A request, its rows and the caller's future."""

    request: GenerationRequest
    rows: list[_Row] = field(default_factory=list)
    done: Future[list[Completion]] = field(default_factory=Future)

    @classmethod
    def of(cls, request: GenerationRequest) -> _Group:
        seed = secrets.randbits(63) if request.seed is None else request.seed
        group = cls(request)
        group.rows = [_Row(group, index, mix_seed(seed, index)) for index in range(request.n)]
        return group

    def finish_if_complete(self) -> None:
        """Hands the responses over as soon as the last row has ended, while the rest of the batch goes on."""
        if not self.done.done() and all(row.finish_reason is not None for row in self.rows):
            with suppress(asyncio.InvalidStateError):  # cancelled meanwhile
                self.done.set_result([row.completion() for row in self.rows])


class _Generator(threading.Thread):
    """The thread that owns the model."""

    def __init__(self, model_dir: Path, version: int, shapes: dict[str, tuple[int, ...]], options: EngineOptions):
        super().__init__(name="transformers-engine", daemon=True)
        self.shapes = shapes
        self.ready: Future[None] = Future()
        self.version = version
        self._model_dir = model_dir
        self._options = options
        self._inbox: queue.SimpleQueue[_Group | _Swap | None] = queue.SimpleQueue()
        self._waiting: list[_Row] = []
        self._active: list[_Row] = []
        self._stopped = threading.Event()
        self._failure: BaseException | None = None

    def submit(self, work: _Group | _Swap) -> None:
        """Queues a request or a weight swap; from any thread."""
        self._inbox.put(work)
        if self._stopped.is_set():
            self._fail_all()

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
                self._receive(block=True)
                if batch := self._next_batch():
                    self._generate(batch)
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
        self._pad_id = self._tokenizer.pad_token_id if self._tokenizer.pad_token_id is not None else self._eos_ids[0]
        # The model's own defaults (repetition penalty, top-k, …) would change the distribution sampled from.
        self._model.generation_config = GenerationConfig()

    # ------------------------------------------------------------------ work

    def _receive(self, block: bool) -> None:
        """Moves what has arrived out of the inbox; blocks for the first piece where nothing else is to do."""
        deadline = 0.0
        while True:
            try:
                if block and not self._waiting:
                    work = self._inbox.get()
                    deadline = time.perf_counter() + GATHER_S
                else:
                    work = self._inbox.get(timeout=max(deadline - time.perf_counter(), 0.0)) if block else (
                        self._inbox.get_nowait()
                    )
            except queue.Empty:
                return
            if work is None:
                return
            if isinstance(work, _Swap):
                self._swap(work)
            else:
                self._waiting.extend(work.rows)

    def _next_batch(self) -> list[_Row]:
        self._waiting = [row for row in self._waiting if not row.group.done.cancelled()]
        batch = self._waiting[: self._options.max_sequences]
        self._waiting = self._waiting[len(batch) :]
        return batch

    def _generate(self, rows: list[_Row]) -> None:
        """One call of ``generate``: prompts of all rows padded on the left to [B, P]."""
        self._active = rows
        for row in rows:
            row.text = _IncrementalText(self._tokenizer, row.group.request.prompt_ids)
        ids, mask = _left_padded([row.group.request.prompt_ids for row in rows], self._pad_id, self._model.device)
        sampler = _Sampler(rows, self._model.device)
        progress = _Progress(rows, sampler, self._eos_ids, self._between_tokens, self.version)
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
        self._active = []

    def _between_tokens(self) -> int | None:
        """Takes in what arrived during the last token; returns the version of the next one, None to stop."""
        self._receive(block=False)
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
        waiting: list[Future[Any]] = [row.group.done for row in (*self._active, *self._waiting)]
        with suppress(queue.Empty):
            while True:
                if (work := self._inbox.get_nowait()) is not None:
                    waiting.append(work.done)
        for future in waiting:
            if not future.done():
                future.set_exception(EngineDiedError(f"the transformers engine {cause}"))


class _Sampler:
    """Draws the next token of every row and leaves it as the only choice.

    The token is the inverse of the cumulative distribution at one uniform number per (seed, sample, position),
    which comes from a counter and not from a generator's state. So a response does not depend on which rows
    happened to share its batch, as it would with a generator per batch.
    """

    def __init__(self, rows: list[_Row], device: torch.device) -> None:
        requests = [row.group.request for row in rows]
        self._rows = rows
        self._temperature = torch.tensor([r.temperature for r in requests], device=device).unsqueeze(1)
        self._top_p = torch.tensor([r.top_p for r in requests], device=device).unsqueeze(1)
        self._greedy = (self._temperature == 0).squeeze(1)
        self._truncates = any(r.top_p < 1 and r.temperature > 0 for r in requests)
        self._position = itertools.count()
        self.logprobs: list[float] = []  # [B], of the tokens drawn last

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``scores``: logits [B, V]. Returns [B, V]: 0 at the drawn tokens, -inf elsewhere."""
        logprobs = processed_logprobs(scores, self._temperature, self._top_p if self._truncates else None)
        position = next(self._position)
        uniform = [mix_seed(row.stream_seed, position) / 2**63 for row in self._rows]
        cumulative = logprobs.double().exp().cumsum(dim=-1)
        # Scaled by the total, which rounding leaves next to 1, so that the number always falls inside.
        threshold = torch.tensor(uniform, dtype=torch.float64, device=scores.device).unsqueeze(1) * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, threshold, right=True).squeeze(1).clamp_(max=scores.shape[-1] - 1)
        tokens = torch.where(self._greedy, scores.argmax(dim=-1), drawn).unsqueeze(1)
        self.logprobs = logprobs.gather(1, tokens).squeeze(1).tolist()
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens, 0.0)


def processed_logprobs(logits: Tensor, temperature: Tensor, top_p: Tensor | None) -> Tensor:
    """Log-probabilities [B, V] (float32) of the distribution that is sampled from.

    Args:
        logits: [B, V], any float type.
        temperature: [B, 1]; 0 stands for greedy decoding and is read as 1, without top-p.
        top_p: [B, 1] nucleus mass, or None for no truncation. The nucleus is the smallest set of most likely
            tokens whose mass reaches top_p (Holtzman et al. 2020, section 3.1); the rest get -inf.
    """
    greedy = temperature == 0
    logits = logits.float() / torch.where(greedy, 1.0, temperature)
    if top_p is None:
        return logits.log_softmax(dim=-1)
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    mass_before = probabilities.cumsum(dim=-1) - probabilities
    outside = (mass_before >= top_p) & (top_p < 1) & ~greedy
    outside[:, 0] = False
    dropped = torch.zeros_like(outside).scatter_(1, order, outside)
    return logits.masked_fill(dropped, -torch.inf).log_softmax(dim=-1)


class _Progress:
    """Reads the drawn tokens, ends rows, keeps the version spans and lets weights in between two tokens."""

    def __init__(self, rows: list[_Row], sampler: _Sampler, eos_ids: list[int], between_tokens: Any, version: int):
        self._rows = rows
        self._sampler = sampler
        self._eos_ids = frozenset(eos_ids)
        self._between_tokens = between_tokens
        self._starts: list[tuple[int, int]] = [(version, 0)]  # (version, first position it drew)
        self._length = 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """``input_ids``: [B, P + t]. Returns [B] bool: which rows have ended."""
        self._length += 1
        tokens = input_ids[:, -1].tolist()
        for row, token_id, logprob in zip(self._rows, tokens, self._sampler.logprobs, strict=True):
            if row.finish_reason is None:
                row.take(token_id, logprob, token_id in self._eos_ids)
                if row.finish_reason is not None:
                    row.spans = self._spans(len(row.token_ids))
                    row.group.finish_if_complete()
        version = self._between_tokens()
        if version is not None and version != self._starts[-1][0]:
            self._starts.append((version, self._length))
        ended = [
            version is None or row.finish_reason is not None or row.group.done.cancelled() for row in self._rows
        ]
        return torch.tensor(ended, device=input_ids.device)

    def _spans(self, length: int) -> tuple[WeightSpan, ...]:
        ends = [start for _, start in self._starts[1:]] + [length]
        return tuple(
            WeightSpan(version, start, end) for (version, start), end in zip(self._starts, ends, strict=True)
        )


class _IncrementalText:
    """The text of a growing response, decoded token by token, and the search for the stop string in it."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, prompt_ids: Any) -> None:
        self.text = ""
        self._backend = tokenizer.backend_tokenizer
        # The prompt goes in first: some tokenizers write the first token of a text without its leading space.
        self._stream = DecodeStream(ids=list(prompt_ids), skip_special_tokens=True)

    def push(self, token_id: int, stop: str) -> bool:
        """Appends a token; True where it completed ``stop``, after which the text is cut."""
        searched = max(len(self.text) - len(stop) + 1, 0)
        try:
            self.text += self._stream.step(self._backend, token_id) or ""
        except Exception:  # bytes that are no UTF-8 and no prefix of any: the stream is lost, the text goes on
            self._stream = DecodeStream(skip_special_tokens=True)
            self.text += self._stream.step(self._backend, token_id) or ""
        found = self.text.find(stop, searched)
        if found < 0:
            return False
        self.text = self.text[: found + len(stop)]
        return True


def _left_padded(prompts: list[Any], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask, int64 [B, P] each; padding in front."""
    width = max(len(prompt) for prompt in prompts)
    ids: NDArray[np.int64] = np.full((len(prompts), width), pad_id, dtype=np.int64)
    mask: NDArray[np.int64] = np.zeros((len(prompts), width), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """All ids that end a sequence, as config, generation config and tokenizer name them."""
    ids: set[int] = set()
    for source in (model.generation_config, model.config, tokenizer):
        value = getattr(source, "eos_token_id", None)
        ids.update(value if isinstance(value, list | tuple) else [] if value is None else [value])
    if not ids:
        raise EngineError("neither the model nor its tokenizer names an end-of-sequence token")
    return sorted(ids)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)
