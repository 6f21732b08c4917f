"""A real run of the demo, small enough for a test: started, watched from outside, struck, and audited."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
from safetensors.numpy import load_file

from common.run_folder import RunFolder
from common.tracking.dispositions_log import read_dispositions
from common.tracking.metrics_log import read_metrics
from common.tracking.summary import read_summary
from deploy.live_run import read_report
from deploy.role_states import RoleState
from learner.checkpoint import latest_valid

ROOT = Path(__file__).parents[2]
MODEL = ("actor.engine=transformers", "model.warm_start.steps=300", "model.warm_start.minutes=5")
SMALL = (
    *MODEL,
    "learner.groups_per_step=8",
    "learner.checkpoint_every=2",
    "learner.eval_every=0",
    "data.heldout_limit=16",
    "broker.lease_s=10",
)
GROUPS_PER_STEP, MAX_STALENESS = 8, 2


class SmallRun:
    """One launcher under test, in a working folder that keeps world and model for the next one."""

    def __init__(
        self,
        folder: Path,
        name: str,
        settings: Sequence[str],
        command: Sequence[str] = ("train",),
        config: str = "demo.yaml",
    ) -> None:
        self.folder = RunFolder(folder / "runs" / name)
        verb, *options = command
        self._command = [sys.executable, "-m", "deploy.cli", verb, str(ROOT / "configs" / config)]
        self._command += [f"run.name={name}", *settings, *options]
        self._cwd = folder
        cache = os.environ.get("DEEPRETRIEVAL_CACHE", str(folder / "cache"))  # a given one saves building the model
        self.environment = {**os.environ, "PYTHONPATH": str(ROOT), "DEEPRETRIEVAL_CACHE": cache}
        self.environment.pop("WANDB_MODE", None)
        self.launcher: subprocess.Popen[str] | None = None
        self._killed: set[int] = set()

    def start(self) -> SmallRun:
        """Start the launcher."""
        self.launcher = subprocess.Popen(
            self._command,
            cwd=self._cwd,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return self

    def finish(self, status: int = 0, seconds: float = 550) -> str:
        """Wait for its end; returns what it printed."""
        assert self.launcher is not None
        output, _ = self.launcher.communicate(timeout=seconds)
        assert self.launcher.returncode == status, output
        assert "Traceback" not in output, output
        return output

    def end(self) -> None:
        """Leave nothing behind, however the test ended."""
        if self.launcher is not None and self.launcher.poll() is None:
            for process in self.processes():
                if process.status() == psutil.STATUS_STOPPED:
                    process.resume()
            self.launcher.send_signal(signal.SIGTERM)
            try:
                self.launcher.communicate(timeout=30)
            except subprocess.TimeoutExpired:
                self.launcher.kill()
                self.launcher.communicate()

    def processes(self) -> list[psutil.Process]:
        """Everything that works in the run's folder, the launcher's roles first of all."""
        return [
            process
            for process in psutil.process_iter(["cmdline"])
            if any(str(self.folder.path) in word for word in process.info["cmdline"] or [])
        ]

    # ------------------------------------------------------------------ watching

    def wait_for(self, reached: Callable[[], bool], seconds: float = 240) -> None:
        """Look until `reached`; the launcher must not end before."""
        assert self.launcher is not None
        deadline = time.monotonic() + seconds
        while not reached():
            assert self.launcher.poll() is None, self.launcher.communicate()[0]
            assert time.monotonic() < deadline, self.launcher_log()
            time.sleep(0.1)

    def wait_for_step(self, step: int, seconds: float = 400) -> None:
        """Until so many policy updates are on record."""
        self.wait_for(lambda: self.step() >= step, seconds)

    def step(self) -> int:
        """Policy updates on record."""
        try:
            return max((int(line.get("version", 0)) for line in read_metrics(self.folder.metrics)), default=0)
        except FileNotFoundError:
            return 0

    def role(self, name: str) -> RoleState | None:
        """What the launcher reports of a role."""
        report = read_report(self.folder.path)
        return next((state for state in report.roles if state.name == name), None) if report else None

    def kill(self, name: str) -> None:
        """SIGKILL, once the role has a process; one that was killed here before is not meant."""
        self.wait_for(lambda: self._living_pid(name) is not None)
        pid = self._living_pid(name)
        assert pid is not None
        self._killed.add(pid)
        os.kill(pid, signal.SIGKILL)

    def _living_pid(self, name: str) -> int | None:
        state = self.role(name)
        known = state is not None and state.pid is not None and state.pid not in self._killed
        return state.pid if state is not None and known and psutil.pid_exists(state.pid or 0) else None

    def launcher_log(self) -> str:
        """What the launcher wrote."""
        log = self.folder.logs / "launcher.txt"
        return log.read_text() if log.exists() else ""

    # ------------------------------------------------------------------ the audit

    def fingerprint(self, steps: int) -> dict[str, str]:
        """Checksums of all weights and Adam moments after `steps`, and what became of every prompt position."""
        checkpoint = latest_valid(self.folder.checkpoints)
        assert checkpoint is not None
        assert checkpoint.name == f"step-{steps:08d}"
        # Of the tensors, not of the files: safetensors writes the entries of its header in any order.
        tensors = {name: array for path in checkpoint.glob("*.safetensors") for name, array in load_file(path).items()}
        sums = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in tensors.items()}
        assert any(name.startswith("model.") for name in sums)
        assert any(name.startswith("optimizer.") for name in sums)
        ended = sorted((line["ticket"], line["disposition"]) for line in read_dispositions(self.folder.dispositions))
        return sums | {"dispositions": repr(ended)}

    def assert_balanced(self, steps: int, groups_per_step: int = GROUPS_PER_STEP) -> None:
        """Every position issued has exactly one disposition, and exactly `steps` batches were trained."""
        summary = read_summary(self.folder.summary)
        ledger = summary["ledger"]
        aside = sum(count for rule, count in ledger.items() if rule.startswith("set_aside"))
        assert ledger["issued"] == ledger["trained"] + ledger["outstanding"] + aside
        assert ledger["trained"] == steps * groups_per_step
        assert summary["trained_samples"] == steps * groups_per_step * 8
        assert summary["dropped_stale"] == 0
        assert summary["max_staleness_seen"] <= MAX_STALENESS
        lines = read_dispositions(self.folder.dispositions)
        tickets = Counter(int(line["ticket"]) for line in lines)
        assert not [ticket for ticket, count in tickets.items() if count > 1], "counted twice"
        lost = set(range(ledger["issued"])) - set(tickets)
        assert len(lost) == ledger["outstanding"], f"lost: {sorted(lost)}"
        trained = Counter(int(line["version"]) for line in lines if line["disposition"] == "trained")
        assert sorted(trained.values()) == [groups_per_step] * steps
        records = [json.loads(line) for line in self.folder.metrics.read_text().splitlines()]
        versions = [line["version"] for line in records if "version" in line]
        assert versions == [float(version) for version in range(1, steps + 1)], "no version twice, none left out"
