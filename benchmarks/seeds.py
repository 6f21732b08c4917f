"""Does a config learn, whatever the seed? Trains it once per seed and prints one JSON line with every run's table.

`python -m benchmarks.seeds configs/demo.yaml --seeds 0 1 2 [--against OTHER]`. The world and the warm-started model are
the config's own; the seed draws prompt order and sampling. `clear` is the number of runs whose trained recall has a
95 % interval above those of all fixed baselines; `doubled` the number in which it is at least twice the warm start's.
With `--against` the other config is trained with the same seeds too, and `difference` has what the first one's held-out
metric, averaged over the seeds, is above the other's: mean and 95 % interval, paired by request.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.run_folder import RunFolder
from common.statistics import paired_bootstrap_difference
from common.tracking.heldout import read_heldout
from common.tracking.summary import REQUIRED_KEYS, read_summary

SHOWN = (*REQUIRED_KEYS, "heldout_above_baselines")


def main() -> None:
    """Train once per seed, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="config overrides for every run")
    parser.add_argument("--against", metavar="CONFIG", help="compare with the runs of this config")
    arguments = parser.parse_args()
    configs = [arguments.config] if arguments.against is None else [arguments.config, arguments.against]
    tables = []
    for config in configs:
        runs = {seed: train(config, seed, arguments.set) for seed in arguments.seeds}
        tables.append(table(Path(config).stem, runs))
    found = tables[0]
    if arguments.against is not None:
        found = {"tables": tables, "difference": difference(arguments.config, arguments.against, arguments.seeds)}
    print(json.dumps(found))


def name_of(config: str, seed: int) -> str:
    """Of a run."""
    return f"{Path(config).stem}-seed{seed}"


def train(config: str, seed: int, overrides: list[str]) -> dict[str, Any]:
    """One run; returns the figures shown."""
    name = name_of(config, seed)
    command = [sys.executable, "-m", "deploy.cli", "train", config, f"run.name={name}", f"run.seed={seed}", *overrides]
    print(f"{name}: {' '.join(command[2:])}", file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=sys.stderr)
    if done.returncode != 0:
        raise SystemExit(f"{name} failed with status {done.returncode}")
    summary = read_summary(Path("runs") / name / "summary.json")
    return {key: summary.get(key) for key in SHOWN}


def difference(config: str, rival: str, seeds: Sequence[int]) -> dict[str, Any]:
    """Of the trained policies, over the held-out requests that both configs have."""
    found = paired_bootstrap_difference(values_per_request(config, seeds), values_per_request(rival, seeds))
    return {"mean": round(found.mean, 4), "ci95": [round(found.low, 4), round(found.high, 4)]}


def values_per_request(config: str, seeds: Sequence[int]) -> list[float]:
    """The metric of each held-out request, the mean over the runs, in the order of the requests' ids."""
    runs = [read_heldout(RunFolder(Path("runs") / name_of(config, seed)).heldout / "trained.json") for seed in seeds]
    by_id = [{row.id: row.value for row in run.rows} for run in runs]
    return [statistics.fmean(values[each] for values in by_id) for each in sorted(by_id[0])]


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
