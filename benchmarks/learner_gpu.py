"""How fast is one training step of a model of real size, and what share of the GPU's arithmetic does it use?

Qwen2.5's architecture with random weights made from its configuration (nothing is downloaded), and packed samples of
1,000 tokens (250 of the prompt, 750 of the response), through the learner's own `Trainer`: score pass where the
settings have one, forward, backward, AdamW. Full fine-tune in bfloat16 with float32 master weights.

    python -m benchmarks.learner_gpu --model 3B                 one GPU
    torchrun --nproc-per-node 8 -m benchmarks.learner_gpu       one row per rank: FSDP2 over eight

Prints one JSON line: `tokens_per_s` (prompt and response tokens trained on, all ranks together), `mfu`, `step_s`
(medians over the steps after the first two), `peak_gib` per GPU, and what was asked for.

MFU (Chowdhery et al. 2022, PaLM, arXiv 2204.02311, appendix B): model FLOPs / (seconds x peak of all GPUs). Model
FLOPs are 6 N per token for a forward and backward pass, N without the input embedding's look-up but with the output
layer, plus attention: 12 x layers x heads x head width x half the sequence, as the mask is causal. What activation
checkpointing computes again is not counted. Passes without gradient are counted where there are any: only a critic's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import Qwen2Config, Qwen2ForCausalLM

from learner.adapters import LoraSettings
from learner.distributed import broadcast_bytes, initialize, shutdown
from learner.samples import TrainSample
from learner.settings import TrainerSettings
from learner.trainer import Trainer

# Hidden, intermediate, layers, heads, key-value heads: https://huggingface.co/collections/Qwen/qwen25
SHAPES = {
    "toy": (64, 128, 2, 2, 2),
    "0.5B": (896, 4864, 24, 14, 2),
    "1.5B": (1536, 8960, 28, 12, 2),
    "3B": (2048, 11008, 36, 16, 2),
}
VOCABULARY = {"toy": 512}  # all others 151,936
# Dense bfloat16 FLOP/s by part of torch's device name, from NVIDIA's data sheets.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12, "RTX 3090": 71e12}
WARM_UP_STEPS = 2


def model_config(name: str) -> Qwen2Config:
    """The configuration of Qwen2.5 of this size, its output layer tied to the input embedding."""
    hidden, intermediate, layers, heads, key_value_heads = SHAPES[name]
    return Qwen2Config(
        vocab_size=VOCABULARY.get(name, 151_936),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
    )


def step_flops(config: Qwen2Config, sequences: int, prompt: int, response: int, critic: bool = False) -> float:
    """Model FLOPs of forward and backward pass over ``sequences`` samples; see the module's docstring.

    The output layer runs over response tokens only. A prompt that several samples share is counted for each. A
    critic is one more backbone, which runs forward once more: for the values before the step.
    """
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in Qwen2ForCausalLM(config).parameters())
    output_layer = config.vocab_size * config.hidden_size
    length = prompt + response
    backbone = 6.0 * (parameters - output_layer) * length
    backbone += 12.0 * config.num_hidden_layers * config.hidden_size * length * length / 2
    forward_share = 1 / 3  # a backward pass costs two forward passes
    return sequences * (backbone * (2 + forward_share if critic else 1) + 6.0 * output_layer * response)


def peak_flops() -> float | None:
    """Of this GPU in bfloat16; None without one, or for one that is not in the table."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def random_samples(arguments: argparse.Namespace, vocabulary: int) -> list[TrainSample]:
    """One prompt per sample: nothing is shared, so that tokens computed are tokens counted."""
    rng = np.random.default_rng(0)
    return [
        TrainSample(
            prompt_ids=rng.integers(0, vocabulary, arguments.prompt).astype(np.int32),
            response_ids=rng.integers(0, vocabulary, arguments.response).astype(np.int32),
            behaviour_logprobs=np.full(arguments.response, -np.log(vocabulary), dtype=np.float32),
            versions=np.zeros(arguments.response, dtype=np.int32),
            reward=float(rng.normal()),
            group=number // 2,
        )
        for number in range(arguments.samples)
    ]


@contextmanager
def model_folder(config: Qwen2Config) -> Iterator[Path]:
    """A folder with a model of random weights, which rank 0 writes and every rank may read."""
    with tempfile.TemporaryDirectory() as folder:
        leads = dist.get_rank() == 0
        if leads:
            torch.manual_seed(0)
            Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        yield Path(broadcast_bytes(folder.encode() if leads else None).decode())
        broadcast_bytes(b"done" if leads else None)  # the others have read it before it goes


def settings_of(arguments: argparse.Namespace) -> TrainerSettings:
    """One optimizer step per training step and no reference: each token passes once, forward and backward."""
    return TrainerSettings(
        kl_coef=0.0,
        advantage="gae" if arguments.critic else "grpo",
        critic="separate" if arguments.critic else "none",
        micro_batch_tokens=arguments.micro_batch_tokens,
        compute_dtype=arguments.dtype,
        lora=LoraSettings(arguments.lora_rank, 2.0 * arguments.lora_rank) if arguments.lora_rank else None,
        activation_checkpointing=not arguments.keep_activations,
        compile=arguments.compile,
        offload=arguments.offload,
    )


def timed_steps(trainer: Trainer, samples: list[TrainSample], steps: int) -> list[float]:
    """Seconds of each step, the device's work included."""
    seconds = []
    for _ in range(steps + WARM_UP_STEPS):
        dist.barrier()
        started = time.perf_counter()
        trainer.step(samples if trainer.leads else None)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds[WARM_UP_STEPS:]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of the JSON line."""
    mesh = initialize(arguments.device)
    config = model_config(arguments.model)
    with model_folder(config) as folder:
        trainer = Trainer(settings_of(arguments), folder, mesh)
    samples = random_samples(arguments, config.vocab_size)
    seconds = statistics.median(timed_steps(trainer, samples, arguments.steps))
    flops = step_flops(config, arguments.samples, arguments.prompt, arguments.response, arguments.critic)
    peak = peak_flops()
    gpu = torch.cuda.is_available()
    return {
        "model": arguments.model,
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "ranks": mesh.size(),
        "tokens_per_s": round(arguments.samples * (arguments.prompt + arguments.response) / seconds, 1),
        "model_tflops_per_s": round(flops / seconds / 1e12, 4),
        "mfu": None if peak is None else round(flops / seconds / peak / mesh.size(), 4),
        "step_s": round(seconds, 4),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if gpu else None,
        "micro_batch_tokens": arguments.micro_batch_tokens,
        "lora_rank": arguments.lora_rank,
        "critic": arguments.critic,
        "compile": arguments.compile,
        "activation_checkpointing": not arguments.keep_activations,
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    described = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    described.add_argument("--model", choices=sorted(SHAPES), default="3B")
    described.add_argument("--samples", type=int, default=64, help="per training step, all ranks together")
    described.add_argument("--prompt", type=int, default=250, help="tokens of each prompt")
    described.add_argument("--response", type=int, default=750, help="tokens of each response")
    described.add_argument("--micro-batch-tokens", type=int, default=16384)
    described.add_argument("--steps", type=int, default=5, help="measured, after two that are not")
    described.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    described.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    described.add_argument("--lora-rank", type=int, default=0, help="0: all weights are trained")
    described.add_argument("--critic", action="store_true", help="PPO: a critic of the same size beside the policy")
    described.add_argument("--compile", action="store_true", help="torch.compile for each layer")
    described.add_argument("--keep-activations", action="store_true", help="no activation checkpointing")
    described.add_argument("--offload", choices=["none", "optimizer"], default="none")
    return described


def main() -> None:
    arguments = parser().parse_args()
    try:
        figures = measure(arguments)
        if dist.get_rank() == 0:
            print(json.dumps(figures))
    finally:
        shutdown()


if __name__ == "__main__":
    main()
