"""How much faster is the asynchronous loop than the same code at `max_staleness: 0`, and than what is possible?

Trains the demo twice on this machine, same samples per step, same number of steps, with a search engine that takes
300 ms per answer: once synchronously, once asynchronously. Prints one JSON line:

* `speedup`: seconds per step, synchronous / asynchronous;
* `bound`: the largest speed-up any schedule could reach with these stages: synchronous step / the longest of
  generation, training, and CPU seconds of all processes / cores, as measured in the synchronous run, where nothing
  competes with them. Scoring is pure waiting and can be hidden entirely;
* `tight_bound`: the same with the shorter time of the two runs for each stage: the synchronous run has small, badly
  filled batches at the end of each generation phase, the asynchronous one full batches;
* `share_of_bound`, `share_of_tight_bound`: speedup / bound;
* `recall_async`, `recall_sync`: held-out recall after training, with their 95 % intervals.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from common.tracking.metrics_log import read_metrics
from common.tracking.summary import read_summary

SYNCHRONOUS = ("learner.max_staleness=0", "sampling.reproducible=false")  # seeded sampling would slow it down
WARM_UP_STEPS = 5  # caches, first batches, compilation of kernels
SAMPLE_EVERY_S = 1.0


@dataclass(frozen=True)
class Measured:
    """One run: mean seconds per step after the warm-up, and what they were spent on."""

    step_s: float
    generation_s: float
    training_s: float
    cpu_s: float
    max_staleness: int
    trained_samples: int
    recall: float
    interval: tuple[float, float]


def main() -> None:
    """Run both and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--latency-ms", type=float, default=300.0)
    parser.add_argument("--staleness", type=int, default=2, help="bound of the asynchronous run")
    parser.add_argument("overrides", nargs="*", help="further config overrides for both runs")
    arguments = parser.parse_args()
    common = [f"learner.steps={arguments.steps}", f"search.latency_ms={arguments.latency_ms}", *arguments.overrides]
    synchronous = measure(arguments.config, "sync", [*common, *SYNCHRONOUS])
    asynchronous = measure(arguments.config, "async", [*common, f"learner.max_staleness={arguments.staleness}"])
    print(json.dumps(compare(synchronous, asynchronous, arguments.latency_ms)))


def compare(synchronous: Measured, asynchronous: Measured, latency_ms: float) -> dict[str, Any]:
    """The JSON line."""
    cores = os.cpu_count() or 1
    runs = (synchronous, asynchronous)
    speedup = synchronous.step_s / asynchronous.step_s
    bound = synchronous.step_s / longest_stage_s([synchronous], cores)
    tight_bound = synchronous.step_s / longest_stage_s(runs, cores)
    return {
        "speedup": round(speedup, 3),
        "bound": round(bound, 3),
        "share_of_bound": round(speedup / bound, 3),
        "tight_bound": round(tight_bound, 3),
        "share_of_tight_bound": round(speedup / tight_bound, 3),
        "recall_async": round(asynchronous.recall, 4),
        "recall_sync": round(synchronous.recall, 4),
        "recall_async_ci95": asynchronous.interval,
        "recall_sync_ci95": synchronous.interval,
        "sync_step_s": round(synchronous.step_s, 3),
        "async_step_s": round(asynchronous.step_s, 3),
        "generation_s": [round(run.generation_s, 3) for run in runs],
        "training_s": [round(run.training_s, 3) for run in runs],
        "cpu_s_per_step": [round(run.cpu_s, 3) for run in runs],
        "cores": cores,
        "latency_ms": latency_ms,
        "max_staleness_seen": asynchronous.max_staleness,
        "trained_samples": [synchronous.trained_samples, asynchronous.trained_samples],
    }


def longest_stage_s(runs: Sequence[Measured], cores: int) -> float:
    """Seconds per step below which no schedule can come, each stage taken where it was shortest."""
    generation_s = min(run.generation_s for run in runs)
    training_s = min(run.training_s for run in runs)
    return max(generation_s, training_s, min(run.cpu_s for run in runs) / cores)


def measure(config: str, name: str, overrides: list[str]) -> Measured:
    """Train once in a process tree of its own and read its metrics."""
    folder = Path("runs") / f"async_vs_sync-{name}"
    command = [sys.executable, "-m", "deploy.cli", "train", config, f"run.name={folder.name}", *overrides]
    print(f"{name}: {' '.join(command[2:])}", file=sys.stderr, flush=True)
    process = subprocess.Popen(command, stdout=sys.stderr)
    usage = watch_cpu(process)
    if process.returncode != 0:
        raise SystemExit(f"the {name} run failed with status {process.returncode}")
    return digest(folder, usage)


def watch_cpu(process: subprocess.Popen[bytes]) -> list[tuple[float, float]]:
    """(seconds since the epoch, CPU seconds of the whole process tree) until the process ends."""
    samples = []
    seen: dict[int, float] = {}
    root = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            for member in [root, *root.children(recursive=True)]:
                times = member.cpu_times()
                seen[member.pid] = times.user + times.system
        except psutil.NoSuchProcess:
            continue
        samples.append((time.time(), sum(seen.values())))
        time.sleep(SAMPLE_EVERY_S)
    return samples


def digest(folder: Path, usage: list[tuple[float, float]]) -> Measured:
    """Means over the steps after the warm-up."""
    steps = [line for line in read_metrics(folder / "metrics.jsonl") if "timing/step_s" in line][WARM_UP_STEPS:]
    step_s = [line["timing/step_s"] for line in steps]
    busy_s = [(1 - line["idle/actor"]) * line["timing/step_s"] for line in steps if "idle/actor" in line]
    first, last = steps[0]["time"] - step_s[0], steps[-1]["time"]
    inside = [sample for sample in usage if first <= sample[0] <= last]
    cpu_share = (inside[-1][1] - inside[0][1]) / (inside[-1][0] - inside[0][0])
    summary = read_summary(folder / "summary.json")
    return Measured(
        step_s=(last - first) / len(steps),
        generation_s=statistics.fmean(busy_s),
        training_s=statistics.fmean(line["timing/train_s"] + line["timing/publish_s"] for line in steps),
        cpu_s=cpu_share * (last - first) / len(steps),
        max_staleness=summary["max_staleness_seen"],
        trained_samples=summary["trained_samples"],
        recall=summary["heldout_recall_trained"],
        interval=tuple(summary["heldout_ci95"]),
    )


if __name__ == "__main__":
    main()
