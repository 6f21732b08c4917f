"""How much of the quota is used, and is it ever exceeded?

Eight rewarder-like processes (the real `BrokerClient` and `PubMedEngine`, 16 searches at a time each) share a quota of
N requests per W seconds through a real broker process, over TCP and CURVE. The service (`benchmarks.quota_server`)
stamps arrivals and enforces the limit under a fixed window, a sliding log and GCRA with a burst of N, at once or one of
them; it works for 0.2 s, the network has jitter, and one request in a hundred stalls, half of these on their way there.
During the run rewarders are killed with SIGKILL (another takes the place) and stopped for 0.5 to 4 s with SIGSTOP, in
turn.

Measured from `WARM_UP_S` after the first arrival, for `--seconds`. The last line is JSON:

* `max_in_any_window`: most arrivals in any W seconds, warm-up included; `limit`: N;
* `rejected_429`, `rejected_share`: refused requests, warm-up included; `rejected_by`: by counter;
* `granted_per_s`: requests admitted per second; `utilisation`: that / (N / W);
* `bound`: what the mode can reach. strict: N / (W + mean RTT); adaptive: N / W. `of_bound`: granted_per_s / bound;
* `mean_rtt_s`: from sending to the first bytes of the answer, as the rewarders that were not stopped meanwhile measured
  it; `mean_service_s`: from the first byte at the service to its answer; `kills`, `stops`.

Exit status 1 where a target is missed: strict: never above N, no refusal, of_bound >= 0.97; adaptive: of_bound >= 0.95,
refused <= 0.1 %.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from benchmarks.quota_server import COUNTERS, ServiceSettings, Tally, run_service
from common import messages as m
from common.broker.server import BrokerServer
from common.broker.service import BrokerService, BrokerSettings, Outgoing
from common.quota import USE_GRANT_WITHIN_S
from common.transport.client import BrokerClient
from common.transport.keys import create_run_keys, load_run_keys
from deploy.roles import end_with_parent
from rewarders.engines.base import EngineUnavailable, SearchRequest
from rewarders.engines.pubmed import PubMedEngine, PubMedSettings

SPAWN = multiprocessing.get_context("spawn")
SEARCHES_AT_ONCE = 16
TIMEOUT_S = 3.0  # of one request
SLACK_S = 1.5
WARM_UP_S = 15.0
TROUBLE_EVERY_S = 15.0
FIRST_ARRIVAL_WITHIN_S = 120.0
TARGETS = {"strict": 0.97, "adaptive": 0.95}
REFUSED_SHARE = 0.001
LONGEST_ANSWER_S = 2.5  # what took longer was read by a rewarder that had been stopped


class _Listening(BrokerService):
    """The broker's service, which keeps what rewarders tell of their round trips, in seconds."""

    def __init__(self, settings: BrokerSettings, now: float) -> None:
        super().__init__(settings, now)
        self.round_trips: list[float] = []

    def handle(self, peer: str, role: m.Role, message: m.ToBroker, payload: m.Payload, now: float) -> list[Outgoing]:
        if isinstance(message, m.SlotReplied) and message.took_s is not None:
            self.round_trips.append(message.took_s)
        return super().handle(peer, role, message, payload, now)


def run_broker(arguments: argparse.Namespace, keys_dir: Path, control: Connection, parent: int) -> None:
    """Entry point of the broker's process: sends its endpoint."""
    end_with_parent(parent, 0.0)
    quota = (arguments.limit, arguments.window, TIMEOUT_S + USE_GRANT_WITHIN_S + SLACK_S)
    settings = BrokerSettings(epoch=time.time_ns() // 1_000_000, lease_s=10.0, quota=quota, quota_mode=arguments.mode)
    service = _Listening(settings, time.monotonic())
    server = BrokerServer(service, load_run_keys(keys_dir, "broker"))
    control.send(server.bind("127.0.0.1", 0))

    def stop() -> bool:
        if control.poll():
            control.recv()
            control.send(service.round_trips)
        return False

    server.run(stop)


def run_rewarder(name: str, endpoint: str, port: int, keys_dir: Path, parent: int) -> None:
    """Entry point of a rewarder-like process: searches for ever."""
    end_with_parent(parent, 0.0)
    asyncio.run(_search_for_ever(name, endpoint, port, keys_dir))


async def _search_for_ever(name: str, endpoint: str, port: int, keys_dir: Path) -> None:
    client = BrokerClient(endpoint, load_run_keys(keys_dir, "rewarder"), "rewarder", name)
    await client.start(60.0)
    settings = PubMedSettings(base_url=f"http://127.0.0.1:{port}", api_key_env=None, timeout_s=TIMEOUT_S)

    async def search() -> None:
        while True:
            with contextlib.suppress(EngineUnavailable):
                await engine.search(SearchRequest("aspirin", retmax=1))

    async with PubMedEngine(settings, permit=client.quota_slot) as engine:
        await asyncio.gather(*(search() for _ in range(SEARCHES_AT_ONCE)))


class Fleet:
    """Service, broker and rewarders, and what is done to these."""

    def __init__(self, arguments: argparse.Namespace, keys_dir: Path) -> None:
        self._keys_dir = keys_dir
        self._rng = random.Random(arguments.seed)
        self._names = iter(range(1_000_000))
        self.kills = self.stops = 0
        settings = ServiceSettings(arguments.limit, arguments.window, arguments.counter, arguments.seed)
        self._service, far = SPAWN.Pipe()
        service = self._start(run_service, settings, far, os.getpid())
        self._port: int = self._service.recv()
        self._broker, far = SPAWN.Pipe()
        broker = self._start(run_broker, arguments, keys_dir, far, os.getpid())
        self._endpoint: str = self._broker.recv()
        self._others = [service, broker]
        self._rewarders = [self._rewarder() for _ in range(arguments.rewarders)]

    def tally(self) -> Tally:
        """What the service has seen so far."""
        self._service.send("tally")
        tally: Tally = self._service.recv()
        return tally

    def round_trips(self) -> list[float]:
        """Seconds from sending to the first bytes of the answer, as the rewarders measured them."""
        self._broker.send("round trips")
        measured: list[float] = self._broker.recv()
        return measured

    def trouble(self, over: threading.Event) -> None:
        """Kill and stop rewarders in turn until it is over."""
        while not over.wait(TROUBLE_EVERY_S * self._rng.uniform(0.8, 1.2)):
            place = self._rng.randrange(len(self._rewarders))
            victim = self._rewarders[place]
            if (self.kills + self.stops) % 2 == 0:
                victim.kill()
                self.kills += 1
                self._rewarders[place] = self._rewarder()
                continue
            assert victim.pid is not None
            os.kill(victim.pid, signal.SIGSTOP)
            self.stops += 1
            over.wait(self._rng.uniform(0.5, 4.0))
            os.kill(victim.pid, signal.SIGCONT)

    def close(self) -> None:
        """End all processes."""
        for process in (*self._rewarders, *self._others):
            process.kill()
            process.join()

    def _rewarder(self) -> BaseProcess:
        name = f"rewarder-{next(self._names)}"
        return self._start(run_rewarder, name, self._endpoint, self._port, self._keys_dir, os.getpid())

    @staticmethod
    def _start(target: Any, *arguments: Any) -> BaseProcess:
        process = SPAWN.Process(target=target, args=arguments, daemon=True)
        process.start()
        return process


def measure(arguments: argparse.Namespace, keys_dir: Path) -> dict[str, Any]:
    """One run."""
    fleet = Fleet(arguments, keys_dir)
    over = threading.Event()
    trouble = threading.Thread(target=fleet.trouble, args=(over,))
    try:
        deadline = time.monotonic() + FIRST_ARRIVAL_WITHIN_S
        while not fleet.tally().arrivals:
            if time.monotonic() > deadline:
                raise SystemExit(f"no request has arrived within {FIRST_ARRIVAL_WITHIN_S:.0f} s")
            time.sleep(0.1)
        print(f"warming up for {WARM_UP_S:g} s, then {arguments.seconds:g} s", file=sys.stderr, flush=True)
        time.sleep(WARM_UP_S)
        began_ns = time.monotonic_ns()
        trouble.start()
        time.sleep(arguments.seconds)
        tally, round_trips = fleet.tally(), fleet.round_trips()
    finally:
        over.set()
        if trouble.ident is not None:
            trouble.join()
        fleet.close()
    return figures(arguments, tally, round_trips, began_ns) | {"kills": fleet.kills, "stops": fleet.stops}


def figures(arguments: argparse.Namespace, tally: Tally, round_trips: list[float], began_ns: int) -> dict[str, Any]:
    """The JSON line, less what was done to the fleet."""
    ended_ns = began_ns + round(arguments.seconds * 1e9)
    granted_per_s = sum(began_ns <= time_ns < ended_ns for time_ns in tally.admitted) / arguments.seconds
    rtt_s = statistics.fmean(took_s for took_s in round_trips if took_s < LONGEST_ANSWER_S)
    most_per_s = arguments.limit / arguments.window
    bound = arguments.limit / (arguments.window + rtt_s) if arguments.mode == "strict" else most_per_s
    return {
        "mode": arguments.mode,
        "counter": arguments.counter,
        "max_in_any_window": most_in_any_window(tally.arrivals, round(arguments.window * 1e9)),
        "limit": arguments.limit,
        "rejected_429": len(tally.refused_at),
        "rejected_share": round(len(tally.refused_at) / len(tally.arrivals), 5),
        "rejected_by": dict(tally.refused_by),
        "granted_per_s": round(granted_per_s, 3),
        "utilisation": round(granted_per_s / most_per_s, 4),
        "bound": round(bound, 3),
        "of_bound": round(granted_per_s / bound, 4),
        "mean_rtt_s": round(rtt_s, 4),
        "mean_service_s": round(statistics.fmean(tally.round_trips), 4),
    }


def most_in_any_window(times: list[int], window: int) -> int:
    """The most of `times` in any half-open window of that length: one such window begins at one of them."""
    times = sorted(times)
    first = most = 0
    for last, moment in enumerate(times):
        while times[first] <= moment - window:
            first += 1
        most = max(most, last - first + 1)
    return most


def missed(result: dict[str, Any]) -> list[str]:
    """The targets that a result misses."""
    strict = result["mode"] == "strict"
    checks = {
        "above the limit": strict and result["max_in_any_window"] > result["limit"],
        "refusals": result["rejected_429"] > 0 if strict else result["rejected_share"] > REFUSED_SHARE,
        "too little granted": result["of_bound"] < TARGETS[result["mode"]],
    }
    return [name for name, failed in checks.items() if failed]


def main() -> int:
    """Measure, print the JSON line, and say what was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--rewarders", type=int, default=8)
    parser.add_argument("--mode", choices=list(TARGETS), default="strict")
    parser.add_argument("--counter", choices=[*COUNTERS, "all"], default="all")
    parser.add_argument("--limit", type=int, default=10)
    parser.add_argument("--window", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        keys_dir = Path(folder) / "keys"
        create_run_keys(keys_dir)
        result = measure(arguments, keys_dir)
    problems = missed(result)
    for problem in problems:
        print(f"missed: {problem}", file=sys.stderr)
    print(json.dumps(result))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
