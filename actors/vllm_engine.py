"""The vLLM engine: continuous batching in vLLM's own process, on GPU or CPU.

What is set and why is in ``_environment`` and ``_engine_arguments``; what runs in vLLM's process is in
``vllm_worker_extension``. Needs vLLM >= 0.32, whose outputs carry the weight version of every token.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Coroutine, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

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
from actors.vllm_worker_extension import ACTOR_PID, ENGINE_THREADS
from actors.weight_file import check_same_model, read_model_shapes, read_weight_file
from common.messages import WeightSpan

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.outputs import CompletionOutput
    from vllm.v1.engine.async_llm import AsyncLLM

T = TypeVar("T")

WORKER_MODULE = "actors.vllm_worker_extension"
CPU_BLOCK_TOKENS = 32  # KV block on a CPU: its kernels want multiples of 32
CPU_STEP_TOKENS = 2048  # tokens of one forward pass on a CPU, more only for a longer prompt
MIN_KV_BYTES = 32 << 20
SHUTDOWN_S = 5.0  # vLLM's processes get so long to end by themselves


class VllmEngine(Engine):
    """``AsyncLLM`` with exact behaviour log-probabilities, version spans and in-flight weight updates."""

    name = "vllm"

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options)
        self._llm: AsyncLLM | None = None
        self._death: asyncio.Future[str] | None = None
        self._sentinels: list[int] = []
        self._updating = asyncio.Lock()
        self._shapes: dict[str, tuple[int, ...]] = {}

    async def prepare(self) -> None:
        """Imports vLLM in a thread: 6 to 10 s."""
        await asyncio.to_thread(_import_vllm)

    async def start(self, model_dir: Path, version: int) -> None:
        """See ``Engine.start``. Occupies the event loop while vLLM starts its process and loads the model."""
        self._shapes = read_model_shapes(model_dir)
        await self.prepare()
        from vllm.v1.engine.async_llm import AsyncLLM

        try:
            with _environment(self.options), warnings.catch_warnings(), _frozen_heap():
                warnings.simplefilter("ignore")  # deprecations inside vLLM; a forked process inherits the filter
                config = _engine_arguments(model_dir, self.options).create_engine_config()
                os.environ.update(_start_method(self.options))
                # The worker prepares its process while it imports this module; a forked one must import it anew.
                sys.modules.pop(WORKER_MODULE, None)
                self._llm = AsyncLLM.from_vllm_config(config, disable_log_stats=not self.options.statistics)
        except Exception as error:
            raise EngineError(f"vLLM did not start with {model_dir}: {error}") from error
        self._watch_processes()
        try:
            await self._or_death(self._label_first_weights(version))
        except BaseException:
            await self.close()
            raise

    async def generate(self, request: GenerationRequest) -> list[Completion]:
        """See ``Engine.generate``."""
        self._check_length(request)
        self._meter.begin()
        completions: list[Completion] = []
        try:
            outputs = await self._or_death(self._outputs(request))
            completions = [_completion(output, request.logprobs) for output in outputs]
            if len(completions) < request.n:  # greedy: all samples are the same, and vLLM draws only one
                completions *= request.n
        finally:
            self._meter.end(completions)
        return completions

    async def problem(self) -> str | None:
        """See ``Engine.problem``."""
        death = self._death
        if death is None or self._llm is None:
            return "the vLLM engine is not running"
        return f"vLLM's engine process {death.result()}" if death.done() else None

    async def load_weights(self, weights: Path, version: int) -> WeightUpdate:
        """See ``Engine.load_weights``."""
        # Shielded: a caller that gives up in the middle would leave the engine paused for ever.
        return await asyncio.shield(asyncio.ensure_future(self._load_weights(weights, version)))

    async def _load_weights(self, weights: Path, version: int) -> WeightUpdate:
        begin = time.perf_counter()
        file = await asyncio.to_thread(read_weight_file, weights)
        check_same_model(file, self._shapes)
        async with self._updating:
            stall_s = await self._or_death(self._swap_weights(weights, version))
        self._meter.stalled(stall_s)
        return WeightUpdate(version, len(file.shapes), file.bytes, stall_s, time.perf_counter() - begin)

    async def close(self) -> None:
        """See ``Engine.close``."""
        if self._llm is None:
            return
        self._unwatch_processes()
        if self._death is not None and not self._death.done():
            self._death.set_result("was closed")
        llm, self._llm = self._llm, None
        processes = _processes(llm)
        if llm.output_handler is not None:
            llm.output_handler.cancel()  # it would log the end of its process as a failure
        await asyncio.to_thread(llm.shutdown, timeout=SHUTDOWN_S)
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()

    async def _label_first_weights(self, version: int) -> None:
        llm = self._running
        if set(await llm.collective_rpc("watched_actor")) != {os.getpid()}:
            raise EngineError("vLLM's worker is not bound to this actor and would outlive it")
        await llm.update_weight_version(str(version))
        self.weight_version = version

    async def _outputs(self, request: GenerationRequest) -> list[CompletionOutput]:
        from vllm.inputs import tokens_input

        # Rendered already: vLLM sends anything else through a thread, at 0.65 ms each on a busy machine.
        prompt = tokens_input(
            list(request.prompt_ids),
            # Cached prefixes are shared within one policy version only: a block kept from older weights would
            # make a response depend on weights that none of its spans names.
            cache_salt=str(self.weight_version),
        )
        outputs: dict[int, CompletionOutput] = {}
        async for output in self._running.generate(prompt, _sampling_parameters(request), request.request_id):
            for sample in output.outputs:
                outputs[sample.index] = sample
                if request.listener is not None:
                    request.listener(sample.index, sample.text)
        return [outputs[index] for index in sorted(outputs)]

    async def _swap_weights(self, weights: Path, version: int) -> float:
        """Pauses, loads, labels and resumes; returns the seconds between pause and resume."""
        llm = self._running
        begin = time.perf_counter()
        # clear_cache would drop the KV of the paused requests and recompute it with the new weights.
        await llm.pause_generation(mode="keep", clear_cache=False)
        try:
            await llm.collective_rpc("load_policy", args=(str(weights.resolve()),))
        except Exception as error:
            # The layers may be half old, half new: nothing generated from here on would have a version.
            raise EngineDiedError(f"vLLM failed while loading {weights}: {error}; restart this actor") from error
        await llm.update_weight_version(str(version))
        self.weight_version = version
        await llm.resume_generation()
        return time.perf_counter() - begin

    @property
    def client(self) -> AsyncLLM:
        """vLLM's own interface to the engine, for its HTTP server.

        Raises:
            EngineDiedError: it is not running.
        """
        return self._running

    @property
    def _running(self) -> AsyncLLM:
        if self._llm is None:
            raise EngineDiedError("the vLLM engine is not running: start it first, and not after close")
        return self._llm

    async def _or_death(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of ``work``, or EngineDiedError as soon as vLLM's process is gone.

        vLLM fails its requests then, but calls such as ``collective_rpc`` would wait for ever.
        """
        death = self._death
        if death is None:
            work.close()
            raise EngineDiedError("the vLLM engine is not running: start it first")
        task = asyncio.ensure_future(work)
        try:
            futures: set[asyncio.Future[Any]] = {task, death}
            await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
            if death.done():
                raise EngineDiedError(f"vLLM's engine process {death.result()}; restart this actor")
            return await task
        except Exception as error:
            if type(error).__name__ == "EngineDeadError":
                raise EngineDiedError(f"vLLM's engine process died: {error}; restart this actor") from error
            if type(error).__name__ == "VLLMValidationError":
                raise ValueError(f"vLLM refuses the request: {error}") from error
            raise
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task

    def _watch_processes(self) -> None:
        loop = asyncio.get_running_loop()
        self._death = loop.create_future()
        for process in _processes(self._running):
            self._sentinels.append(process.sentinel)
            loop.add_reader(process.sentinel, self._process_ended, process)

    def _process_ended(self, process: Any) -> None:
        self._unwatch_processes()
        process.join(timeout=1)
        if self._death is not None and not self._death.done():
            self._death.set_result(f"(pid {process.pid}) ended with exit code {process.exitcode}")

    def _unwatch_processes(self) -> None:
        loop = asyncio.get_running_loop()
        while self._sentinels:
            loop.remove_reader(self._sentinels.pop())


def _import_vllm() -> None:
    # Read by vLLM, torch and huggingface_hub when they are imported; what the user has set stays.
    for name, value in {
        "VLLM_LOGGING_LEVEL": "ERROR",  # on a CPU every start warns of a dozen things that are as they should be
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",  # models come as local folders
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    try:
        import vllm.v1.engine.async_llm  # noqa: F401
    except Exception as error:
        raise EngineError(
            f"vLLM cannot be imported ({type(error).__name__}: {error}); run `deepretrieval doctor`, "
            "or set actor.engine=transformers"
        ) from error


@contextlib.contextmanager
def _environment(options: EngineOptions) -> Iterator[None]:
    """Variables that vLLM and its processes read while they start; put back afterwards."""
    from vllm.platforms import current_platform

    values = {ACTOR_PID: str(os.getpid())}
    if current_platform.is_cpu():
        values[ENGINE_THREADS] = values["OMP_NUM_THREADS"] = str(options.threads)
        # Lets the worker run inside the engine-core process: one process and one import of vLLM less.
        values["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    changed = {*values, "VLLM_WORKER_MULTIPROC_METHOD"}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _frozen_heap() -> Iterator[None]:
    """Keeps a forked process from finalizing the actor's garbage, which may hold sockets the two share."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _start_method(options: EngineOptions) -> Mapping[str, str]:
    """On a CPU vLLM insists on spawning; forking saves importing vLLM a second time (half of the start).

    Only where the engine has one thread: an OpenMP thread pool does not survive a fork.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or options.threads > 1:
        return {}
    return {"VLLM_WORKER_MULTIPROC_METHOD": "fork"}


def _engine_arguments(model_dir: Path, options: EngineOptions) -> Any:
    """``AsyncEngineArgs`` for this model and machine."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    arguments: dict[str, Any] = {
        "model": str(model_dir),
        "dtype": options.dtype,
        "max_model_len": options.max_model_len,
        "max_num_seqs": options.max_sequences,
        "enforce_eager": on_cpu if options.enforce_eager is None else options.enforce_eager,
        # The raw log-probabilities would be those of another distribution than the one sampled from.
        "logprobs_mode": "processed_logprobs",
        "enable_prefix_caching": True,
        "worker_extension_cls": f"{WORKER_MODULE}.PolicyWorker",
        "use_tqdm_on_load": False,
    }
    if on_cpu:
        config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
        _register_architecture(config)
        arguments["block_size"] = CPU_BLOCK_TOKENS
        # A seeded request whose prompt is prefilled in pieces kills vLLM 0.32 on a CPU ("CPU Generator does not
        # use offset"): no pieces, so a step has to have room for the longest prompt, and for a token of every
        # sequence, without which vLLM does not start.
        arguments["enable_chunked_prefill"] = False
        arguments["max_num_batched_tokens"] = max(options.max_model_len, options.max_sequences, CPU_STEP_TOKENS)
        # A size of our own also spares the warm-up that would measure one; zeroing a GiB takes 1.7 s.
        arguments["kv_cache_memory_bytes"] = _kv_cache_bytes(config, options)
    else:
        arguments["gpu_memory_utilization"] = options.gpu_memory_share
    return AsyncEngineArgs(**arguments)


def _register_architecture(config: Mapping[str, Any]) -> None:
    """Tells vLLM the model class, which it would otherwise look up in a subprocess: 10 s on a first start.

    The subprocess keeps CUDA out of the caller, which is no concern on a CPU.
    """
    from vllm.model_executor.models import ModelRegistry

    if config.get("architectures") == ["Qwen2ForCausalLM"]:
        from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM

        ModelRegistry.register_model("Qwen2ForCausalLM", Qwen2ForCausalLM)


def _kv_cache_bytes(config: Mapping[str, Any], options: EngineOptions) -> int:
    """KV cache in which all sequences fit at full length, with a quarter to spare, up to ``kv_cache_gib``."""
    heads = config["num_attention_heads"]
    head_width = config.get("head_dim") or config["hidden_size"] // heads
    values_per_token = 2 * config["num_hidden_layers"] * config.get("num_key_value_heads", heads) * head_width
    bytes_per_token = values_per_token * (4 if options.dtype == "float32" else 2)
    wanted = bytes_per_token * (options.max_model_len + CPU_BLOCK_TOKENS) * options.max_sequences * 5 // 4
    return min(max(wanted, MIN_KV_BYTES), int(options.kv_cache_gib * 2**30))


def _sampling_parameters(request: GenerationRequest) -> SamplingParams:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    return SamplingParams(
        n=request.n if request.temperature > 0 else 1,
        temperature=request.temperature,
        top_p=request.top_p,
        max_tokens=request.max_tokens,
        stop=[request.stop],
        include_stop_str_in_output=True,
        # vLLM gives sample i the seed + i: without mixing, neighbouring seeds would share most samples' noise.
        seed=None if request.seed is None else mix_seed(request.seed),
        logprobs=0 if request.logprobs else None,  # 0: of the sampled token only
        flat_logprobs=True,
        output_kind=RequestOutputKind.FINAL_ONLY if request.listener is None else RequestOutputKind.CUMULATIVE,
        structured_outputs=StructuredOutputsParams(regex=request.pattern) if request.pattern else None,
    )


def _completion(output: CompletionOutput, wanted: bool) -> Completion:
    """wanted: the log-probabilities."""
    if output.finish_reason not in ("stop", "length"):
        raise EngineError(f"vLLM ended a response with {output.finish_reason!r} instead of stop or length")
    token_ids = np.asarray(output.token_ids, dtype=np.int32)
    logprobs = np.empty(0, np.float32)
    if wanted:
        flat: Any = output.logprobs
        # At each position the sampled token comes first.
        logprobs = np.asarray([flat.logprobs[i] for i in flat.start_indices[: len(token_ids)]], dtype=np.float32)
    spans = tuple(WeightSpan(int(span.version), span.start, span.end) for span in output.weight_versions or ())
    if (wanted and len(logprobs) != len(token_ids)) or (spans[-1].end if spans else 0) != len(token_ids):
        raise EngineError(f"vLLM returned {len(token_ids)} tokens, {len(logprobs)} log-probabilities, spans {spans}")
    return Completion(token_ids, logprobs, output.text, output.finish_reason, spans)


def _processes(llm: AsyncLLM) -> list[Any]:
    """The processes vLLM started for this engine."""
    manager = getattr(llm.engine_core.resources, "engine_manager", None)
    return list(getattr(manager, "processes", []))
