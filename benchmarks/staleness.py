"""What does staleness cost, and which loss corrects for it? Trains the demo once per bound and loss.

    python -m benchmarks.staleness --staleness 0 1 4 8 16 --losses decoupled tis uncorrected --seeds 0

Same samples per step and same number of steps in every cell: held-out recall, wall-clock, and how old the tokens were.

* `decoupled`: clipped around the proximal policy, times the capped weight proximal / behaviour (`decoupled_ppo`);
* `tis`: policy gradient times the capped weight current / behaviour (`tis`);
* `uncorrected`: clipped around the proximal policy as if it had drawn the samples (`ppo_clip`).

**How the samples are made as old as the bound allows.** The learner keeps (bound + 1) × groups_per_step groups
outstanding and trains groups_per_step of them per version, so a group spends bound + 1 versions between its ticket and
its training, whatever is slow (Little's law). It ages from the first token that is drawn. So `actor.concurrent_groups`
is set to all groups that can be outstanding: none waits undrawn, and `staleness_oldest`, the staleness of a sample's
oldest token, comes near the bound. `staleness_token` is lower where generation is what is slow, because weights are
updated between two tokens and the later tokens of a sample are younger.

Finished cells are kept in FOLDER/cells.json; the same command goes on with those that are missing. A PNG is drawn
beside it (or to --plot). The JSON line has every cell, and for each loss and bound the difference of held-out recall
to the synchronous cells (bound 0) of that loss, paired by request, with its 95 % interval over requests. Seeds spread
too: `recall_by_seed` has each.
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

import msgspec

from common.config import load_config
from common.statistics import bootstrap_interval, paired_bootstrap_difference
from common.tracking.heldout import read_heldout
from common.tracking.jsonl import replace_file
from common.tracking.metrics_log import read_metrics, series
from common.tracking.summary import read_summary

LOSSES = {"decoupled": "decoupled_ppo", "tis": "tis", "uncorrected": "ppo_clip"}
UNSEEDED = "sampling.reproducible=false"  # seeded sampling slows the synchronous run down
KV_MIB_PER_GROUP = 4  # of the demo's model: 8 samples of 256 tokens at 2 KiB


class Cell(msgspec.Struct, frozen=True):
    """One finished run.

    Attributes:
        recall: per held-out request, in their order.
        wall_s: of the learner, evaluations included. step_s: mean seconds between two updates.
        staleness_token, staleness_oldest: mean over the trained tokens, and over steps of the oldest token, in policy
            versions, once the pipeline is full. staleness_max: the oldest token of the run.
    """

    loss: str
    staleness: int
    seed: int
    recall: list[float]
    recall_start: float
    wall_s: float
    step_s: float
    staleness_token: float
    staleness_oldest: float
    staleness_max: int
    trained_samples: int

    @property
    def key(self) -> str:
        """What tells it from the other cells."""
        return cell_key(self.loss, self.staleness, self.seed)


class Record(msgspec.Struct):
    """The finished cells, and what they were all run with."""

    config: str
    overrides: list[str]
    cells: dict[str, Cell] = {}


def main() -> None:
    """Run the missing cells, then print and draw all."""
    arguments = parse()
    overrides = [f"learner.steps={arguments.steps}", f"search.latency_ms={arguments.latency_ms}", UNSEEDED]
    overrides += arguments.overrides
    path = arguments.folder / "cells.json"
    record = read_record(path, Record(arguments.config, overrides))
    wanted = [
        (loss, bound, seed) for seed in arguments.seeds for bound in arguments.staleness for loss in arguments.losses
    ]
    for loss, bound, seed in wanted:
        if cell_key(loss, bound, seed) not in record.cells:
            cell = run_cell(record, loss, bound, seed)
            record.cells[cell.key] = cell
            arguments.folder.mkdir(parents=True, exist_ok=True)
            replace_file(path, msgspec.json.format(msgspec.json.encode(record)) + b"\n")
    rows = summarize([record.cells[cell_key(*cell)] for cell in wanted])
    print(markdown(rows))
    plot = draw(rows, arguments.plot or arguments.folder / "staleness.png")
    print(json.dumps({"steps": arguments.steps, "latency_ms": arguments.latency_ms, "plot": plot, "rows": rows}))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 4, 8, 16])
    parser.add_argument("--losses", nargs="+", choices=sorted(LOSSES), default=list(LOSSES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--latency-ms", type=float, default=300.0, help="of the search engine, in every cell")
    parser.add_argument("--folder", type=Path, default=Path("runs/staleness"), help="of cells.json")
    parser.add_argument("--plot", type=Path, help="default: FOLDER/staleness.png")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config overrides for every cell")
    return parser.parse_intermixed_args()


def read_record(path: Path, wanted: Record) -> Record:
    """The cells finished before; none where there is no file. Exits where they were run with other settings."""
    if not path.exists():
        return wanted
    record = msgspec.json.decode(path.read_bytes(), type=Record)
    if (record.config, record.overrides) != (wanted.config, wanted.overrides):
        raise SystemExit(f"{path} has cells of {record.config} {record.overrides}: choose another --folder")
    return record


def cell_key(loss: str, bound: int, seed: int) -> str:
    """As in cells.json."""
    return f"{loss}/{bound}/{seed}"


def run_cell(record: Record, loss: str, bound: int, seed: int) -> Cell:
    """Train once, in a process tree of its own."""
    name = f"staleness-{loss}-{bound}-seed{seed}"
    settings = [*record.overrides, f"run.name={name}", f"run.seed={seed}", f"algorithm.loss={LOSSES[loss]}"]
    settings += full_queue(record, bound)
    command = [sys.executable, "-m", "deploy.cli", "train", record.config, *settings]
    print(f"{name}: {' '.join(command[2:])}", file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=sys.stderr)
    if done.returncode != 0:
        raise SystemExit(f"{name} failed with status {done.returncode}; the same command goes on with this cell")
    return digest(Path("runs") / name, loss, bound, seed)


def full_queue(record: Record, bound: int) -> list[str]:
    """Settings under which every group that may be outstanding is drawn at once."""
    config = load_config(Path(record.config), record.overrides)
    groups = (bound + 1) * config.learner.groups_per_step
    memory = max(config.actor.kv_cache_gib, groups * KV_MIB_PER_GROUP / 1024)
    return [
        f"learner.max_staleness={bound}",
        f"actor.concurrent_groups={groups}",
        f"actor.kv_cache_gib={memory:.2f}",
        f"rewarder.concurrent_groups={max(config.rewarder.concurrent_groups, groups)}",
    ]


def digest(folder: Path, loss: str, bound: int, seed: int) -> Cell:
    """The figures of a finished run. Ages count from the step on at which samples can be as old as the bound."""
    steps = [line for line in read_metrics(folder / "metrics.jsonl") if "timing/step_s" in line]
    full = steps[min(bound, len(steps) - 1) :]
    summary = read_summary(folder / "summary.json")
    return Cell(
        loss=loss,
        staleness=bound,
        seed=seed,
        recall=read_heldout(folder / "heldout" / "trained.json").values,
        recall_start=summary["heldout_recall_start"],
        wall_s=round(summary["wall_s"], 1),
        step_s=round((steps[-1]["time"] - steps[0]["time"]) / max(len(steps) - 1, 1), 3),
        staleness_token=round(statistics.fmean(value for _, value in series(full, "staleness/mean")), 2),
        staleness_oldest=round(statistics.fmean(value for _, value in series(full, "staleness/max")), 2),
        staleness_max=summary["max_staleness_seen"],
        trained_samples=summary["trained_samples"],
    )


def summarize(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """One row per loss and bound, over its seeds."""
    groups: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.loss, cell.staleness), []).append(cell)
    return [_row(loss, bound, same, groups.get((loss, 0))) for (loss, bound), same in sorted(groups.items())]


def _row(loss: str, bound: int, cells: Sequence[Cell], synchronous: Sequence[Cell] | None) -> dict[str, Any]:
    recall = mean_per_request(cells)
    interval = bootstrap_interval(recall)
    row: dict[str, Any] = {
        "loss": loss,
        "max_staleness": bound,
        "recall": round(interval.mean, 4),
        "ci95": [round(interval.low, 4), round(interval.high, 4)],
        "recall_by_seed": {str(cell.seed): round(statistics.fmean(cell.recall), 4) for cell in cells},
        "recall_start": round(statistics.fmean(cell.recall_start for cell in cells), 4),
        "trained_samples": sorted({cell.trained_samples for cell in cells}),
        "staleness_max": max(cell.staleness_max for cell in cells),
    }
    for name in ("wall_s", "step_s", "staleness_token", "staleness_oldest"):
        row[name] = round(statistics.fmean(getattr(cell, name) for cell in cells), 3)
    if bound and synchronous is not None and len(synchronous) == len(cells):
        difference = paired_bootstrap_difference(recall, mean_per_request(synchronous))
        row["against_synchronous"] = round(difference.mean, 4)
        row["against_synchronous_ci95"] = [round(difference.low, 4), round(difference.high, 4)]
    return row


def mean_per_request(cells: Sequence[Cell]) -> list[float]:
    """Recall of each held-out request, the mean over seeds; the requests are the same in every cell."""
    return [statistics.fmean(values) for values in zip(*(cell.recall for cell in cells), strict=True)]


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table for docs/benchmarks.md."""
    lines = [
        "| loss | bound | held-out recall | 95 % interval | against bound 0 | step | run | age: token, oldest, most |",
        "| --- | ---: | ---: | --- | --- | ---: | ---: | --- |",
    ]
    for row in rows:
        against = "–"
        if "against_synchronous" in row:
            low, high = row["against_synchronous_ci95"]
            against = f"{row['against_synchronous']:+.3f} ({low:+.3f} to {high:+.3f})"
        low, high = row["ci95"]
        ages = f"{row['staleness_token']:.1f} / {row['staleness_oldest']:.1f} / {row['staleness_max']}"
        cells = (row["loss"], row["max_staleness"], f"{row['recall']:.3f}", f"{low:.3f} – {high:.3f}", against)
        lines.append(f"| {' | '.join(map(str, cells))} | {row['step_s']:.2f} s | {row['wall_s']:.0f} s | {ages} |")
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> str | None:
    """The plot; returns where it is, None without matplotlib."""
    try:
        from benchmarks.staleness_plot import draw_rows
    except ImportError:
        print("no plot: matplotlib is not installed (pip install -e '.[tracking]')", file=sys.stderr)
        return None
    draw_rows(rows, path)
    return str(path)


if __name__ == "__main__":
    main()
