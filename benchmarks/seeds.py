"""Does a config learn, whatever the seed? Trains it once per seed and prints one JSON line with every run's table.

`python -m benchmarks.seeds configs/demo.yaml --seeds 0 1 2`. The world and the warm-started model are the config's own;
the seed draws prompt order and sampling. `clear` is the number of runs whose trained recall has a 95 % interval
above those of all fixed baselines; `doubled` the number in which it is at least twice the warm start's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from common.tracking.summary import REQUIRED_KEYS, read_summary

SHOWN = (*REQUIRED_KEYS, "heldout_above_baselines")


def main() -> None:
    """Train once per seed, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="config overrides for every run")
    arguments = parser.parse_args()
    runs = {seed: train(arguments.config, seed, arguments.set) for seed in arguments.seeds}
    print(json.dumps(table(Path(arguments.config).stem, runs)))


def train(config: str, seed: int, overrides: list[str]) -> dict[str, Any]:
    """One run; returns the figures shown."""
    name = f"{Path(config).stem}-seed{seed}"
    command = [sys.executable, "-m", "deploy.cli", "train", config, f"run.name={name}", f"run.seed={seed}", *overrides]
    print(f"{name}: {' '.join(command[2:])}", file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=sys.stderr)
    if done.returncode != 0:
        raise SystemExit(f"{name} failed with status {done.returncode}")
    summary = read_summary(Path("runs") / name / "summary.json")
    return {key: summary.get(key) for key in SHOWN}


def table(config: str, runs: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """The JSON line."""
    trained = [run["heldout_recall_trained"] for run in runs.values()]
    doubled = [run["heldout_recall_trained"] >= 2 * run["heldout_recall_start"] for run in runs.values()]
    return {
        "config": config,
        "trained": trained,
        "clear": sum(bool(run["heldout_above_baselines"]) for run in runs.values()),
        "doubled": sum(doubled),
        "runs": runs,
    }


if __name__ == "__main__":
    main()
