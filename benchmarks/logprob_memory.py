"""What do log-probabilities in blocks of the vocabulary save in memory, and what do they cost in time?

Ours (`learner.logprobs.linear_logprobs`, which also yields the entropy) against the naive
`F.log_softmax((hidden @ weight.T).float(), -1).gather(...)`: forward, and backward to hidden states and weight. Every
measurement is one pass in a process of its own, ours and naive in turns, the allocator set as the learner's
(`deploy.processes.KEEP_MEMORY`) for both. Prints one JSON line, in 10^6 bytes and medians over the rounds:

* `peak_mb`, `naive_peak_mb`: the process's largest resident memory during the pass, less what was resident before it
  (interpreter, torch, inputs, upstream gradient) and less the size of the two gradients, which both have to return;
  `ratio` = ours / naive;
* `seconds`, `naive_seconds`, `time_ratio`: of the pass, by the wall; `cpu_time_ratio`: by the processor's time, which
  other work on the machine disturbs less;
* `dtype`, `block_width`, and the same figures for every further dtype under its name.

It checks that both give the same log-probabilities and gradients.
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
import time
from typing import Any

from deploy.processes import KEEP_MEMORY

# float32 sums of the same terms in another order; bfloat16 rounds every product.
TOLERANCES = {"float32": 1e-3, "bfloat16": 2e-2}
GIVEN = ("tokens", "vocabulary", "hidden", "threads")


def run_pass(kind: str, dtype: str, tokens: int, vocabulary: int, hidden: int, threads: int) -> dict[str, float]:
    """One forward and backward pass in this process, which must have done nothing large before."""
    import psutil
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    kinds = {"ours": _ours, "naive": _naive}
    for width in (64, hidden):  # a small pass first: thread pool, libraries
        small = width != hidden
        states = torch.empty(8 if small else tokens, width, dtype=getattr(torch, dtype)).normal_()
        weight = torch.empty(256 if small else vocabulary, width, dtype=states.dtype).normal_(std=width**-0.5)
        targets = torch.randint(0, len(weight), (len(states),))
        upstream = torch.randn(len(states))
        states.requires_grad_()
        weight.requires_grad_()
        before = psutil.Process().memory_info().rss
        started, cpu_started = time.perf_counter(), time.process_time()
        logprobs = kinds[kind](states, weight, targets)
        logprobs.backward(upstream)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert states.grad is not None
    assert weight.grad is not None
    return {
        "extra": peak - before - states.nbytes - weight.nbytes,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "logprobs": float(logprobs.detach().double().norm()),
        "hidden_gradient": float(states.grad.float().norm()),
        "weight_gradient": math.hypot(*(float(rows.float().norm()) for rows in weight.grad.split(4096))),
    }


def _ours(states: Any, weight: Any, targets: Any) -> Any:
    from learner.logprobs import linear_logprobs

    return linear_logprobs(states, weight, targets, 1.0)[0]


def _naive(states: Any, weight: Any, targets: Any) -> Any:
    from torch.nn import functional as F

    table = F.log_softmax((states @ weight.T).float(), dim=-1)
    return table.gather(1, targets.unsqueeze(1)).squeeze(1)


def measure(kind: str, dtype: str, arguments: argparse.Namespace) -> dict[str, float]:
    """``run_pass`` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.logprob_memory", "--pass", kind, "--dtypes", dtype]
    for name in GIVEN:
        command += [f"--{name}", str(getattr(arguments, name))]
    done = subprocess.run(command, env=os.environ | KEEP_MEMORY, stdout=subprocess.PIPE, check=True, text=True)
    result: dict[str, float] = json.loads(done.stdout)
    print(f"{dtype} {kind}: {result}", file=sys.stderr, flush=True)
    return result


def compare(dtype: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All rounds of one dtype."""
    passes: dict[str, list[dict[str, float]]] = {"ours": [], "naive": []}
    for number in range(arguments.rounds):
        for kind in ("ours", "naive") if number % 2 == 0 else ("naive", "ours"):
            passes[kind].append(measure(kind, dtype, arguments))
    ours, naive = (
        {key: statistics.median(each[key] for each in passes[kind]) for key in passes[kind][0]} for kind in passes
    )
    for key in ("logprobs", "hidden_gradient", "weight_gradient"):
        assert math.isclose(ours[key], naive[key], rel_tol=TOLERANCES[dtype]), f"{key}: {ours[key]}, {naive[key]}"
    return {
        "dtype": dtype,
        "peak_mb": round(ours["extra"] / 1e6, 1),
        "naive_peak_mb": round(naive["extra"] / 1e6, 1),
        "ratio": round(ours["extra"] / naive["extra"], 4),
        "time_ratio": _ratio(passes, "seconds"),
        "cpu_time_ratio": _ratio(passes, "cpu_seconds"),
        "seconds": round(ours["seconds"], 2),
        "naive_seconds": round(naive["seconds"], 2),
    }


def _ratio(passes: dict[str, list[dict[str, float]]], key: str) -> float:
    """Median over rounds of ours / naive: what slows a round slows both."""
    rounds = zip(passes["ours"], passes["naive"], strict=True)
    return round(statistics.median(ours[key] / naive[key] for ours, naive in rounds), 3)


def facts(arguments: argparse.Namespace) -> dict[str, Any]:
    """Settings and machine."""
    import torch

    from learner.logprobs import BLOCK_ELEMENTS, MIN_BLOCK_WIDTH

    capability = torch.backends.cpu.get_cpu_capability()
    return {
        **{name: getattr(arguments, name) for name in (*GIVEN, "rounds")},
        "block_width": max(BLOCK_ELEMENTS // arguments.tokens, MIN_BLOCK_WIDTH),
        "machine": f"{os.cpu_count()} cores, {platform.machine()} {capability}, torch {torch.__version__}",
    }


def main() -> None:
    """Measure and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", choices=sorted(TOLERANCES), default=["float32", "bfloat16"])
    parser.add_argument(
        "--pass", dest="kind", choices=["ours", "naive"], help="one pass here, for this benchmark itself"
    )
    arguments = parser.parse_args()
    if arguments.kind:
        sizes = {name: getattr(arguments, name) for name in GIVEN}
        print(json.dumps(run_pass(arguments.kind, arguments.dtypes[0], **sizes)))
        return
    first, *others = (compare(dtype, arguments) for dtype in arguments.dtypes)
    print(json.dumps(first | {each["dtype"]: each for each in others} | facts(arguments)))


if __name__ == "__main__":
    main()
