"""Is anything lost, counted twice or invented while processes die? Kills them, then audits what the run left.

`python -m benchmarks.chaos --minutes 10 --seed 0` trains the demo with 3 actors, 4 rewarders, broker and learner on a
search server that fails 10 % of the requests. First a calm reference, then chaos: every 3-8 s a random role is killed
with SIGKILL, or stopped (SIGSTOP) for 3-8 s and continued. The folders `runs/chaos-SEED` and `runs/chaos-SEED-calm` are
made anew. Events go to stderr. Prints one JSON line:

* `kills`, `stops`: what was done; `prompts`: positions of the prompt stream that were issued;
* `lost`, `duplicated`, `wrong_reward`: see `benchmarks.chaos_audit`; each has to be 0. `wrong_reward` counts trained
  samples whose reward differs from the one they get when they are scored again, offline and without faults;
* `max_staleness_seen`: policy versions, over all trained samples; `peak_queue_bytes`: in the broker, looked at each
  second;
* `throughput_vs_calm`: trained groups per second during chaos / in the calm run. Counted from the final record: steps
  that a killed learner lost do not count.

The exit status is 1 if the account does not balance, or if the run did not survive.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import aiohttp
import psutil

from benchmarks.chaos_audit import TRAINED, Findings, Line, Records, audit, ended_in, staleness, steps_between
from benchmarks.chaos_records import MissingRecordError, prompt_stream, read_records, rules_of, true_rewards
from benchmarks.chaos_run import RunEndedError, Say, WatchedRun

GAP_S = (3.0, 8.0)
STOP_S = (3.0, 8.0)
ACTORS, REWARDERS = 3, 4
NAMES = ("broker", "learner", *(f"actor-{n}" for n in range(ACTORS)), *(f"rewarder-{n}" for n in range(REWARDERS)))
FIRST_STEP_S = 900.0  # the world and the model may have to be built
CALM_AFTER_S = 5.0
RECOVERY_S = 180.0  # longer without a step after the last strike, and the run counts as stuck
SHOWN = 5
OVERRIDES = (
    "actor.engine=transformers",
    f"actor.count={ACTORS}",
    f"rewarder.count={REWARDERS}",
    "search.fault_rate=0.1",
    "search.timeout_s=5",  # a late answer is one of the faults: what is waited for it is known to be in vain
    "learner.steps=1000000",
    "learner.checkpoint_every=5",
    "learner.eval_every=0",
    "data.heldout_limit=16",
    "tracking.samples_per_step=100000",
    "broker.lease_s=10",
)


@dataclass(frozen=True)
class Phase:
    """A stretch of a run that counts: seconds since the epoch, and what was seen over it."""

    run: WatchedRun
    begin: float
    end: float
    faults: dict[str, int]


@dataclass(frozen=True)
class Audited:
    """The records of a run and what they say."""

    records: Records
    findings: Findings
    steps: list[Line]

    def ended_per_s(self, phase: Phase) -> tuple[float, float]:
        """Groups trained, and positions ended in any way, per second of the phase."""
        ended = ended_in(self.records.dispositions, steps_between(self.steps, phase.begin, phase.end))
        seconds = phase.end - phase.begin
        return ended[TRAINED] / seconds, ended.total() / seconds


class Chaos:
    """Strikes one role after the other, drawn by a seed; `struck` counts (name, "kill" or "stop")."""

    def __init__(self, run: WatchedRun, seed: int, say: Say) -> None:
        self.struck: Counter[tuple[str, str]] = Counter()
        self._run = run
        self._random = random.Random(seed)
        self._say = say
        self._stopped: dict[str, asyncio.TimerHandle] = {}

    async def rage(self, seconds: float) -> None:
        """Strike every 3-8 s; everything that is stopped goes on when this returns. Raises RunEndedError."""
        deadline = time.monotonic() + seconds
        try:
            while (left := deadline - time.monotonic()) > 0:
                await asyncio.sleep(min(left, self._random.uniform(*GAP_S)))
                self._run.check_alive()
                if time.monotonic() < deadline:
                    self._strike()
        finally:
            for timer in self._stopped.values():
                timer.cancel()
            self._stopped.clear()
            for process in self._run.roles().values():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.resume()

    def _strike(self) -> None:
        """Three draws whatever is alive, so that equal seeds mean equal plans."""
        action = self._random.choice(("kill", "stop"))
        wishes = self._random.sample(NAMES, len(NAMES))
        stop_s = self._random.uniform(*STOP_S)
        roles = self._run.roles()
        name = next((n for n in wishes if n in roles and not (action == "stop" and n in self._stopped)), None)
        if name is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            self._kill(name, roles[name]) if action == "kill" else self._stop(name, roles[name], stop_s)
            self.struck[name, action] += 1

    def _kill(self, name: str, process: psutil.Process) -> None:
        process.kill()
        if timer := self._stopped.pop(name, None):
            timer.cancel()
        self._say(name, "killed")

    def _stop(self, name: str, process: psutil.Process, seconds: float) -> None:
        process.suspend()
        self._stopped[name] = asyncio.get_running_loop().call_later(seconds, self._continue, name, process)
        self._say(name, f"stopped for {seconds:.1f} s")

    def _continue(self, name: str, process: psutil.Process) -> None:
        del self._stopped[name]
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()
            self._say(name, "continued")


def main() -> None:
    """Run both and audit both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--minutes", type=float, default=10.0, help="length of the chaos")
    parser.add_argument("--calm-minutes", type=float, default=2.0, help="length of the calm reference")
    parser.add_argument("--seed", type=int, default=0, help="of the chaos, the faults and the run")
    parser.add_argument("overrides", nargs="*", help="further config overrides for both runs")
    arguments = parser.parse_args()
    try:
        figures = asyncio.run(_until_terminated(arguments))
    except asyncio.CancelledError:
        raise SystemExit(130) from None
    except (RunEndedError, MissingRecordError) as error:
        raise SystemExit(f"the run did not survive: {error}") from None
    print(json.dumps(figures))
    sys.exit(any(figures[key] for key in ("lost", "duplicated", "wrong_reward", "too_stale", "inconsistent")))


async def _until_terminated(arguments: argparse.Namespace) -> dict[str, Any]:
    task = asyncio.create_task(benchmark(arguments))
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a shell's background jobs start with it ignored
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    return await task


async def benchmark(arguments: argparse.Namespace) -> dict[str, Any]:
    """The calm run, the run with chaos, and the figures of both. Raises RunEndedError, MissingRecordError."""
    say = speaker()
    overrides = [*OVERRIDES, f"run.seed={arguments.seed}", *arguments.overrides]
    name = f"chaos-{arguments.seed}"
    calm = await calm_phase(WatchedRun(arguments.config, f"{name}-calm", overrides, say), arguments.calm_minutes * 60)
    calm_audit = await audited(calm.run, say)
    run = WatchedRun(arguments.config, name, overrides, say)
    chaos = Chaos(run, arguments.seed, say)
    wild = await wild_phase(run, chaos, arguments.minutes * 60)
    wild_audit = await audited(run, say)
    return figures_of(arguments, chaos, wild, wild_audit, calm, calm_audit)


async def calm_phase(run: WatchedRun, seconds: float) -> Phase:
    """Train undisturbed, faults of the search server excepted."""
    try:
        await run.start(FIRST_STEP_S)
        begin = time.time()
        await asyncio.sleep(seconds)
        phase = Phase(run, begin, time.time(), await fault_counts(run))
        await run.interrupt()
        return phase
    finally:
        await run.kill()


async def wild_phase(run: WatchedRun, chaos: Chaos, seconds: float) -> Phase:
    """Train while roles are struck, then wait until the run has made steps again."""
    try:
        await run.start(FIRST_STEP_S)
        begin = time.time()
        await chaos.rage(seconds)
        end = time.time()
        await asyncio.sleep(CALM_AFTER_S)
        since = time.time()
        await run.wait_for(
            lambda: any(step["time"] > since for step in run.steps()), RECOVERY_S, "a step after the last strike"
        )
        phase = Phase(run, begin, end, await fault_counts(run))
        await run.interrupt()
        return phase
    finally:
        await run.kill()


async def audited(run: WatchedRun, say: Say) -> Audited:
    """Read the run's records and check them; what is wrong is said by name. Raises MissingRecordError."""
    records = read_records(run.folder)
    prompts = prompt_stream(run.config)
    say("audit", f"scoring {len(records.samples)} trained samples again")
    rewards = await true_rewards(run.config, prompts, records.samples)
    findings = audit(records, rules_of(run.config, prompts), rewards)
    for kind in ("lost", "duplicated", "wrong_reward", "too_stale", "inconsistent"):
        wrong = getattr(findings, kind)
        for item in wrong[:SHOWN]:
            say("audit", f"{kind}: {item}")
        if len(wrong) > SHOWN:
            say("audit", f"{kind}: and {len(wrong) - SHOWN} more")
    return Audited(records, findings, run.steps())


async def fault_counts(run: WatchedRun) -> dict[str, int]:
    """Faults of the search server so far, by kind."""
    async with aiohttp.ClientSession() as session, session.get(f"{run.config.search.url}/health") as response:
        return dict((await response.json())["faults"])


def figures_of(
    arguments: argparse.Namespace, chaos: Chaos, wild: Phase, wild_audit: Audited, calm: Phase, calm_audit: Audited
) -> dict[str, Any]:
    """The JSON line. The calm run has to balance as well: what is wrong there is added."""
    findings = (wild_audit.findings, calm_audit.findings)
    wild_trained, wild_ended = wild_audit.ended_per_s(wild)
    calm_trained, calm_ended = calm_audit.ended_per_s(calm)
    dispositions = Counter(line["disposition"] for line in wild_audit.records.dispositions)
    return {
        "kills": sum(count for (_, action), count in chaos.struck.items() if action == "kill"),
        "stops": sum(count for (_, action), count in chaos.struck.items() if action == "stop"),
        "prompts": wild_audit.records.ledger.cursor,
        "lost": sum(len(found.lost) for found in findings),
        "duplicated": sum(len(found.duplicated) for found in findings),
        "wrong_reward": sum(len(found.wrong_reward) for found in findings),
        "max_staleness_seen": max((staleness(sample) for sample in wild_audit.records.samples), default=0),
        "throughput_vs_calm": round(wild_trained / calm_trained, 3) if calm_trained else None,
        "peak_queue_bytes": wild.run.peak_queue_bytes,
        "too_stale": sum(len(found.too_stale) for found in findings),
        "inconsistent": sum(len(found.inconsistent) for found in findings),
        "seed": arguments.seed,
        "minutes": arguments.minutes,
        "calm_minutes": arguments.calm_minutes,
        "chaos_groups_per_s": round(wild_trained, 3),
        "calm_groups_per_s": round(calm_trained, 3),
        "ended_vs_calm": round(wild_ended / calm_ended, 3) if calm_ended else None,
        "versions": wild_audit.records.version,
        "dispositions": dict(dispositions),
        "outstanding": len(wild_audit.records.ledger.outstanding),
        "trained_samples_rescored": len(wild_audit.records.samples),
        "struck": {f"{name} {action}": count for (name, action), count in sorted(chaos.struck.items())},
        "restarts": dict(sorted(wild.run.restarts.items())),
        "learner_restarts": wild.run.restarts["learner"],
        "steps_lost": wild.run.steps_lost,
        "faults": wild.faults,
    }


def speaker() -> Say:
    """Says events on stderr, with the seconds since now."""
    began = time.monotonic()

    def say(role: str, what: str) -> None:
        print(f"{time.monotonic() - began:7.1f} s  {role:<12} {what}", file=sys.stderr, flush=True)

    return say


if __name__ == "__main__":
    main()
