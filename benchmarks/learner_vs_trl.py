"""How fast is one optimizer step of GRPO in our learner against TRL's `GRPOTrainer`, on the same samples?

One tiny Qwen2 with random weights, one batch: groups of 8 responses of 20 to 500 tokens to a prompt of 250. Ours is
`learner.trainer.Trainer.step`, TRL's the training loop of `GRPOTrainer` (`benchmarks/trl_step.py`); both in float32
with AdamW, clip 0.2, no reference model, the token mean as denominator, no activation checkpointing, the same threads
and allocator settings. Each side runs in a process of its own, in turns; the first step of every process does not
count. TRL's micro-batch is the fastest of `--peer-rows`. Both sides must report the same loss and gradient norm. Prints
one JSON line:

* `tokens_per_s`, `trl_tokens_per_s`: prompt and response tokens of all samples / seconds of a step, median over all
  steps; `ratio`: ours / TRL's, median over the rounds;
* `peak_mb`, `trl_peak_mb`: largest resident memory in 10^6 bytes during the steps, above that with model, trainer and
  Adam's moments in place.

TRL needs an interpreter that has it: `--peer-python` (default: this one).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from deploy.processes import KEEP_MEMORY

GROUP = 8
PROMPT_TOKENS = 250
RESPONSE_TOKENS = (20, 500)
VOCABULARY = 4096
INSTALL = (
    "{python} cannot import trl. Install it into an environment of its own and pass its interpreter:\n"
    "  python -m venv trl-env && trl-env/bin/pip install torch=={torch} trl transformers\n"
    "  python -m benchmarks.learner_vs_trl --peer-python trl-env/bin/python"
)


def build_model(folder: Path) -> None:
    """A Qwen2 of 5 million random weights, a fifth of them in the embedding."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)


def draw_batch(path: Path, groups: int) -> int:
    """Write the samples; returns their prompt and response tokens."""
    rng = np.random.default_rng(0)
    low, high = RESPONSE_TOKENS
    lengths = rng.integers(low, high + 1, groups * GROUP)
    rewards = rng.normal(size=(groups, GROUP))
    advantages = (rewards - rewards.mean(1, keepdims=True)) / rewards.std(1, keepdims=True)
    np.savez(
        path,
        prompts=rng.integers(2, VOCABULARY, (groups, PROMPT_TOKENS)),
        responses=rng.integers(2, VOCABULARY, lengths.sum()),
        lengths=lengths,
        groups=np.repeat(np.arange(groups), GROUP),
        rewards=rewards.ravel(),
        advantages=advantages.ravel(),
    )
    return int(lengths.sum() + len(lengths) * PROMPT_TOKENS)


def read_samples(path: str) -> list[Any]:
    """The batch as the learner gets it. The behaviour policy plays no part in ``ppo_clip`` with one minibatch."""
    from learner.samples import TrainSample

    batch = np.load(path, allow_pickle=False)
    responses = np.split(batch["responses"].astype(np.int32), np.cumsum(batch["lengths"])[:-1])
    prompts = batch["prompts"].astype(np.int32)
    return [
        TrainSample(
            prompt_ids=prompts[group],
            response_ids=response,
            behaviour_logprobs=np.full(len(response), -math.log(VOCABULARY), dtype=np.float32),
            versions=np.zeros(len(response), dtype=np.int32),
            reward=float(reward),
            group=int(group),
        )
        for group, response, reward in zip(batch["groups"], responses, batch["rewards"], strict=True)
    ]


def run_ours(model: str, batch: str, steps: int, threads: int, micro_batch_tokens: int) -> dict[str, Any]:
    """Our steps in this process."""
    import torch
    import transformers

    from learner.distributed import initialize, shutdown
    from learner.settings import TrainerSettings
    from learner.trainer import Trainer

    torch.set_num_threads(threads)
    settings = TrainerSettings(
        lr=1e-6, loss="ppo_clip", kl_coef=0.0, weight_decay=0.0, micro_batch_tokens=micro_batch_tokens
    )
    samples = read_samples(batch)
    trainer = Trainer(settings, model, initialize("cpu"))
    before = psutil.Process().memory_info().rss
    seconds, figures = [], []
    for _ in range(steps):
        began = time.perf_counter()
        figures.append(trainer.step(samples))
        seconds.append(time.perf_counter() - began)
    shutdown()
    return {
        "seconds": seconds,
        "extra": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before,
        "loss": figures[0]["loss"],
        "grad_norm": figures[0]["grad_norm"],
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


class Sides:
    """Runs either side in a process of its own."""

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        self._inputs = [str(folder / "model"), str(folder / "batch.npz")]
        self._arguments = arguments

    def ours(self, steps: int) -> dict[str, Any]:
        """A warm-up step and ``steps`` more of ours."""
        tokens = str(self._arguments.micro_batch_tokens)
        command = [sys.executable, "-m", "benchmarks.learner_vs_trl", "--here", *self._inputs]
        return self._run("ours", [*command, "--micro-batch-tokens", tokens], steps)

    def trl(self, steps: int, rows: int) -> dict[str, Any]:
        """A warm-up step and ``steps`` more of TRL."""
        script = str(Path(__file__).with_name("trl_step.py"))
        return self._run(
            f"trl, {rows} rows", [self._arguments.peer_python, script, *self._inputs, "--rows", str(rows)], steps
        )

    def _run(self, name: str, command: list[str], steps: int) -> dict[str, Any]:
        command += ["--steps", str(steps + 1), "--threads", str(self._arguments.threads)]
        environment = os.environ | KEEP_MEMORY | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        result["seconds"] = result["seconds"][1:]
        print(f"{name}: {result}", file=sys.stderr, flush=True)
        return result


def compare(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """All rounds; returns the JSON line's figures."""
    build_model(folder / "model")
    tokens = draw_batch(folder / "batch.npz", arguments.groups)
    sides = Sides(folder, arguments)
    tried = {rows: min(sides.trl(1, rows)["seconds"]) for rows in arguments.peer_rows}
    rows = min(tried, key=lambda each: tried[each])
    ours: list[dict[str, Any]] = []
    peer: list[dict[str, Any]] = []
    for number in range(arguments.rounds):
        turns = [
            lambda: ours.append(sides.ours(arguments.steps)),
            lambda: peer.append(sides.trl(arguments.steps, rows)),
        ]
        for turn in turns if number % 2 == 0 else reversed(turns):
            turn()
    for key in ("loss", "grad_norm"):
        assert math.isclose(ours[0][key], peer[0][key], rel_tol=0.01, abs_tol=2e-4), f"{key} differs: {ours}, {peer}"
    speed, trl_speed = (
        tokens / statistics.median(seconds for run in side for seconds in run["seconds"]) for side in (ours, peer)
    )
    medians = [
        statistics.median(theirs["seconds"]) / statistics.median(own["seconds"])
        for own, theirs in zip(ours, peer, strict=True)
    ]
    return {
        "tokens_per_s": round(speed, 1),
        "trl_tokens_per_s": round(trl_speed, 1),
        "ratio": round(statistics.median(medians), 3),
        "peak_mb": round(max(run["extra"] for run in ours) / 1e6, 1),
        "trl_peak_mb": round(max(run["extra"] for run in peer) / 1e6, 1),
        "ratios": [round(each, 3) for each in medians],
        "trl_rows": rows,
        "trl_seconds_by_rows": {each: round(seconds, 2) for each, seconds in tried.items()},
        "loss": [round(side[0]["loss"], 5) for side in (ours, peer)],
        "grad_norm": [round(side[0]["grad_norm"], 5) for side in (ours, peer)],
        "tokens": tokens,
        "versions": ours[0]["versions"],
        "trl_versions": peer[0]["versions"],
    }


def require_trl(python: str) -> None:
    """End with the way to install it if ``python`` has no trl."""
    import torch

    if subprocess.run([python, "-c", "import trl"], stderr=subprocess.DEVNULL).returncode != 0:
        raise SystemExit(INSTALL.format(python=python, torch=torch.__version__.partition("+")[0]))


def main() -> None:
    """Measure and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter that can import trl")
    parser.add_argument(
        "--peer-rows", type=int, nargs="+", default=[2, 4, 8, 16], help="micro-batches TRL may choose from"
    )
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="timed steps of every process")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--micro-batch-tokens", type=int, default=4096)
    parser.add_argument("--here", nargs=2, metavar=("MODEL", "BATCH"), help="our steps here, for this benchmark itself")
    arguments = parser.parse_args()
    if arguments.here:
        done = run_ours(*arguments.here, arguments.steps, arguments.threads, arguments.micro_batch_tokens)
        print(json.dumps(done))
        return
    require_trl(arguments.peer_python)
    settings = {
        name: getattr(arguments, name) for name in ("groups", "rounds", "steps", "threads", "micro_batch_tokens")
    }
    machine = f"{os.cpu_count()} cores, {platform.machine()}"
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(compare(Path(folder), arguments) | settings | {"machine": machine}))


if __name__ == "__main__":
    main()
