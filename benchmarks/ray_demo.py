"""Does the demo come to its end on a Ray cluster that loses a node and gets another?

`python -m benchmarks.ray_demo` trains the demo under `deepretrieval launch --on ray` on three nodes of one machine
(`ray.cluster_utils.Cluster`). After a third of the steps the node of an actor is ended at once, with all that runs on
it, and a new one joins. Events go to stderr, the run to `runs/ray-demo`. Prints one JSON line:

* `steps`: policy updates on record; `nodes_removed`, `nodes_added`: in mid-run;
* `prompts`: positions of the prompt stream that were issued; `lost`, `duplicated`: those of them without a disposition
  that are not outstanding, and those with more than one (`benchmarks.chaos_audit`);
* `max_staleness_seen`: policy versions, over all trained samples;
* `recall_start`, `recall_trained`: held-out recall of the policy before and after; `wall_s`: of the training.

The exit status is 1 if the account does not balance, or if the run did not come to its end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.chaos import FIRST_STEP_S, audited, speaker
from benchmarks.chaos_audit import staleness
from benchmarks.chaos_records import MissingRecordError
from benchmarks.chaos_run import RunEndedError, Say, WatchedRun
from benchmarks.ray_nodes import ENVIRONMENT, Nodes
from common.config import load_config
from common.tracking.summary import heldout_figure, read_summary
from deploy.live_run import read_report

VICTIM = "actor-0"
NEW_NODE_CPUS = 3
MOVED_WITHIN_S = 180.0
STEP_S = 30.0  # no step takes longer
OVERRIDES = (
    "actor.engine=transformers",
    "actor.threads=2",
    "rewarder.count=2",
    "broker.lease_s=10",
    "tracking.samples_per_step=100000",
)


@dataclass
class Changes:
    """What was done to the cluster."""

    removed: int = 0
    added: int = 0


def main() -> None:
    """Run, audit, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("overrides", nargs="*", help="further config overrides, as learner.steps=12")
    arguments = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    nodes = Nodes()
    try:
        figures = asyncio.run(benchmark(arguments.config, arguments.overrides, nodes))
    except (RunEndedError, MissingRecordError) as error:
        raise SystemExit(f"the run did not survive: {error}") from None
    finally:
        nodes.shutdown()
    print(json.dumps(figures))
    sys.exit(any(figures[key] for key in ("lost", "duplicated", "wrong_reward", "too_stale", "inconsistent")))


async def benchmark(config: str, overrides: list[str], nodes: Nodes) -> dict[str, Any]:
    """The run and its figures. Raises RunEndedError, MissingRecordError."""
    say, changes = speaker(), Changes()
    settings = [*OVERRIDES, *overrides]
    steps = load_config(Path(config), settings).learner.steps
    run = WatchedRun(config, "ray-demo", settings, say, ("launch", "--on", "ray", "--address", nodes.address))
    try:
        await run.start(FIRST_STEP_S)
        await run.wait_for(lambda: len(run.steps()) >= steps // 3, steps * STEP_S, f"step {steps // 3}")
        await replace_node(run, nodes, changes, say)
        await run.finish(FIRST_STEP_S + steps * STEP_S)
    finally:
        await run.kill()
    findings = await audited(run, say)
    summary = read_summary(run.folder.summary)
    return {
        "steps": findings.records.version,
        "nodes_removed": changes.removed,
        "nodes_added": changes.added,
        "prompts": findings.records.ledger.cursor,
        "lost": len(findings.findings.lost),
        "duplicated": len(findings.findings.duplicated),
        "max_staleness_seen": max((staleness(sample) for sample in findings.records.samples), default=0),
        "recall_start": summary[heldout_figure("recall", "start")],
        "recall_trained": summary[heldout_figure("recall", "trained")],
        "wall_s": round(summary["wall_s"], 1),
        "wrong_reward": len(findings.findings.wrong_reward),
        "too_stale": len(findings.findings.too_stale),
        "inconsistent": len(findings.findings.inconsistent),
    }


async def replace_node(run: WatchedRun, nodes: Nodes, changes: Changes, say: Say) -> None:
    """End the node of an actor, wait until that is noticed, and let another one join. Raises RunEndedError."""
    lost = node_of(run, VICTIM)
    nodes.lose(lost)  # not in a thread, nor the one below: Ray sets signal handlers
    changes.removed += 1
    say("cluster", f"node {lost} of {VICTIM} is lost")
    await run.wait_for(lambda: node_of(run, VICTIM) != lost, MOVED_WITHIN_S, f"the loss of {VICTIM} to be noticed")
    nodes.add(NEW_NODE_CPUS)
    changes.added += 1
    say("cluster", "a node has joined")
    await run.wait_for(
        lambda: node_of(run, VICTIM) not in ("", lost), MOVED_WITHIN_S, f"{VICTIM} to run on another node"
    )
    say(VICTIM, f"runs on node {node_of(run, VICTIM)}")


def node_of(run: WatchedRun, name: str) -> str:
    """The id of the Ray node on which a role runs, as the launcher shows it; "" while it has none."""
    report = read_report(run.folder.path)
    state = next((role for role in report.roles if role.name == name), None) if report else None
    return state.where.rpartition("node ")[2].rstrip(")") if state is not None and state.state == "running" else ""


if __name__ == "__main__":
    main()
