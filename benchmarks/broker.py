"""How fast is the broker, against forwarding the same bytes and nothing else?

Groups of 8 samples x 512 tokens go learner -> actor -> rewarder -> learner: one learner, 4 actors (producers of
rollouts), 4 rewarders (consumers of them), each a process of its own on TCP loopback under CURVE. They are lean
synchronous pyzmq loops, so that the middle is what is measured, and do no work: an actor answers every ticket with a
ready-made rollout. Two middles are run in turn, in one run:

* the broker (`BrokerServer`): leases, credit, validation, three stages;
* a bare pyzmq ROUTER between the same DEALERs, which passes each message to the next peer of the next role in turn and
  keeps nothing. It sends the same frames at each hop, from one ready-made group where the broker sends what it stored.
  Its learner does not confirm what it receives, as ours does.

Neither side sends heartbeats (one small message per peer and second). Prints one JSON line:

* `groups_per_s`, `raw_groups_per_s`: groups that reach the learner per second while `--window` are under way; medians
  over the rounds. `ratio`: median over the rounds of broker / raw of the same round;
* `p50_ms`, `p99_ms`: from the submission of a group's ticket to its arrival at the learner, at half of
  `groups_per_s`, submitted evenly; `raw_p50_ms`, `raw_p99_ms`: the forwarder's at the same rate;
* `broker_cpu_share`: CPU seconds of the broker's process per second at full rate; above 1 with libzmq's I/O thread;
* `us_per_group_at`: CPU microseconds per group of the `BrokerService` alone (no sockets), all three stages, while each
  stage holds so many other groups; `us_per_group_growth`: at the most groups / at the fewest.
"""

from __future__ import annotations

import argparse
import json
import pstats
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.broker_fleet import STATIONS, Fleet, Frames, Group, Sizes
from common import messages as m
from common.broker.service import BrokerService, BrokerSettings, Work
from common.transport.keys import create_run_keys

FILL_LEVELS = (10, 100, 1_000, 10_000, 100_000)
FILL_ROUNDS = 10


def compare(arguments: argparse.Namespace, keys_dir: Path) -> dict[str, float]:
    """Both systems in turn."""
    sizes = Sizes(arguments.samples, arguments.tokens)
    ours, raw = Fleet("broker", keys_dir, sizes, arguments.profile), Fleet("raw", keys_dir, sizes)
    rates, raw_rates, shares = [], [], []
    for number in range(arguments.rounds):
        rate, share = ours.full_rate(arguments.window, arguments.seconds)
        raw_rate, _ = raw.full_rate(arguments.window, arguments.seconds)
        progress(f"round {number + 1}: broker {rate:.0f} groups/s, raw {raw_rate:.0f}, ratio {rate / raw_rate:.2f}")
        rates.append(rate)
        raw_rates.append(raw_rate)
        shares.append(share)
    moderate = statistics.median(rates) / 2
    latencies = []
    for number in range(arguments.rounds):
        latencies.append(
            [*ours.latencies_ms(moderate, arguments.seconds), *raw.latencies_ms(moderate, arguments.seconds)]
        )
        p50_ms, p99_ms, raw_p50_ms, raw_p99_ms = latencies[-1]
        progress(f"round {number + 1} at {moderate:.0f} groups/s: p99 {p99_ms:.1f} ms, raw {raw_p99_ms:.1f} ms")
    p50_ms, p99_ms, raw_p50_ms, raw_p99_ms = map(statistics.median, zip(*latencies, strict=True))
    for fleet in (ours, raw):
        fleet.stop()
    ratios = [rate / raw_rate for rate, raw_rate in zip(rates, raw_rates, strict=True)]
    return {
        "groups_per_s": round(statistics.median(rates), 1),
        "raw_groups_per_s": round(statistics.median(raw_rates), 1),
        "ratio": round(statistics.median(ratios), 3),
        "p50_ms": round(p50_ms, 2),
        "p99_ms": round(p99_ms, 2),
        "raw_p50_ms": round(raw_p50_ms, 2),
        "raw_p99_ms": round(raw_p99_ms, 2),
        "broker_cpu_share": round(statistics.median(shares), 3),
    }


# --------------------------------------------------------------------------- the service alone


class FilledService:
    """A service whose stages hold `queued` groups each, and never more or fewer after a group has passed."""

    def __init__(self, queued: int, group: Group, samples: int) -> None:
        settings = BrokerSettings(epoch=1, queue_items=2 * queued + 1024, queue_bytes=1 << 50)
        self._group = group
        self._next = 10_000_000
        self._service = BrokerService(settings, now=0.0)
        for role in STATIONS:
            self._service.handle(role, role, m.Hello(role, 1), (), 0.0)
        for number, (role, stage) in enumerate(STATIONS.items(), 1):
            first = 1_000_000 * number
            payload: Frames = [group.ticket(first), *group.rollout(first), group.scores(first)]
            work = Work(payload[: {"rollout": 1, "score": 5, "train": 6}[stage]], samples)
            for item in range(first, first + queued):
                self._service.stages[stage].offer(item, work, 1000, (1, item))
            self._service.handle(role, role, m.Serve(stage, 1), (), 0.0)
        self._leases = {out.peer: out.message.lease for out in self._service.tick(0.0)}

    def pass_groups(self, groups: int) -> float:
        """CPU seconds per group: a ticket, a rollout, scores and a confirmation each; making them is not counted."""
        spent = 0.0
        for _ in range(groups):
            messages = self._messages()
            started = time.thread_time()
            for role, message, payload in messages:
                self._service.handle(role, role, message, payload, 0.0)
                for out in self._service.tick(0.0):
                    self._leases[out.peer] = out.message.lease
            spent += time.thread_time() - started
        return spent / groups

    def _messages(self) -> list[tuple[m.Role, m.AnyToBroker, Frames]]:
        self._next += 1
        rollout, scored = self._leases["actor"], self._leases["rewarder"]
        return [
            ("learner", m.Submit((self._next,)), [self._group.ticket(self._next)]),
            ("learner", m.Complete(self._leases["learner"]), []),
            ("rewarder", m.Complete(scored), [self._group.scores(scored.item)]),
            ("actor", m.Complete(rollout), self._group.rollout(rollout.item)),
        ]


def fill_levels(arguments: argparse.Namespace) -> dict[str, Any]:
    """The cost per group at each number of queued groups; the levels take turns, so that drifts hit all of them."""
    group = Group(Sizes(arguments.samples, arguments.tokens))
    services = {queued: FilledService(queued, group, arguments.samples) for queued in FILL_LEVELS}
    seconds: dict[int, list[float]] = {queued: [] for queued in FILL_LEVELS}
    for _ in range(FILL_ROUNDS):
        for queued, service in services.items():
            seconds[queued].append(service.pass_groups(arguments.groups // FILL_ROUNDS))
    costs = {queued: round(1e6 * statistics.median(each), 1) for queued, each in seconds.items()}
    progress(f"us per group at so many queued groups: {costs}")
    return {"us_per_group_at": costs, "us_per_group_growth": round(costs[FILL_LEVELS[-1]] / costs[FILL_LEVELS[0]], 2)}


def progress(text: str) -> None:
    """Tell who watches."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Measure and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each measurement")
    parser.add_argument("--rounds", type=int, default=5, help="alternations of the two systems")
    parser.add_argument("--window", type=int, default=128, help="groups under way at full rate")
    parser.add_argument("--groups", type=int, default=1000, help="groups per measurement of the service alone")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--profile", type=Path, help="write a cProfile of the broker here and print its top")
    arguments = parser.parse_args()
    figures = fill_levels(arguments)
    with tempfile.TemporaryDirectory() as folder:
        keys_dir = Path(folder) / "keys"
        create_run_keys(keys_dir)
        figures = compare(arguments, keys_dir) | figures
    if arguments.profile:
        pstats.Stats(str(arguments.profile), stream=sys.stderr).sort_stats("tottime").print_stats(25)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
