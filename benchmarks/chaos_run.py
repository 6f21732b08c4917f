"""A run of `deepretrieval train` seen from outside: its processes, its durable record, its broker's queues."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from benchmarks.chaos_audit import Line
from common.config import Config, load_config
from common.run_folder import RunFolder
from common.tracking.metrics_log import read_metrics
from common.transport.client import BrokerClient, BrokerUnreachableError
from common.transport.keys import load_run_keys

ROLES = ("broker", "learner", "actor", "rewarder")
LOOK_EVERY_S = 1.0
END_GRACE_S = 90.0

Say = Callable[[str, str], None]  # (role, what happened)


class RunEndedError(RuntimeError):
    """The run under test ended, or stood still; the message has its last words."""


def role_name(command: Sequence[str]) -> str | None:
    """The name in the fleet of the role that a command line starts; None for any other command."""
    words = list(command)
    for before, word, role in zip(words, words[1:], words[2:], strict=False):
        if (before, word) == ("-m", "deploy.cli") and role in ROLES:
            return words[words.index("--name") + 1] if "--name" in words[:-1] else role
    return None


class WatchedRun:
    """Starts the launcher in `folder`, made anew, and looks at it once a second until it is ended.

    command: of `deepretrieval`, before the config; its options follow the overrides.
    """

    def __init__(
        self, config: str, name: str, overrides: Sequence[str], say: Say, command: Sequence[str] = ("train",)
    ) -> None:
        self.folder = RunFolder(Path("runs") / name)
        self.restarts: Counter[str] = Counter()
        self.steps_lost = 0
        self.peak_queue_bytes = 0
        verb, *options = command
        self._command = [sys.executable, "-m", "deploy.cli", verb, config, f"run.name={name}", *overrides, *options]
        self._say = say
        self._launcher: asyncio.subprocess.Process | None = None
        self._output = self.folder.path / "launcher.out"
        self._pids: dict[str, int] = {}
        self._tasks: list[asyncio.Task[None]] = []

    # ------------------------------------------------------------------ life

    async def start(self, timeout_s: float) -> None:
        """Start it and wait for its first trained step.

        Raises:
            RunEndedError: it ended, or did not get there in time.
        """
        shutil.rmtree(self.folder.path, ignore_errors=True)
        self.folder.path.mkdir(parents=True)
        self._say("launcher", " ".join(self._command[2:]))
        with self._output.open("wb") as output:
            self._launcher = await asyncio.create_subprocess_exec(
                *self._command, stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output
            )
        await self.wait_for(lambda: bool(self.steps()), timeout_s, "the first trained step")
        self._tasks = [asyncio.create_task(self._watch_record()), asyncio.create_task(self._watch_queues())]

    async def interrupt(self) -> None:
        """Ctrl-C: the learner writes a checkpoint and everything ends.

        Raises:
            RunEndedError: it did not end as a saved run does.
        """
        assert self._launcher is not None
        await self._stop_watching()
        self._say("launcher", "interrupted")
        self._launcher.send_signal(signal.SIGINT)
        try:
            status = await asyncio.wait_for(self._launcher.wait(), END_GRACE_S)
        except TimeoutError:
            raise RunEndedError(f"the run does not end on Ctrl-C: {self.last_words()}") from None
        if status != 130:
            raise RunEndedError(f"the run ended with status {status}, not 130: {self.last_words()}")

    async def finish(self, timeout_s: float) -> None:
        """Wait for its own end. Raises RunEndedError: not in time, or not as a complete run ends."""
        assert self._launcher is not None
        try:
            status = await asyncio.wait_for(self._launcher.wait(), timeout_s)
        except TimeoutError:
            raise RunEndedError(f"the run has not ended after {timeout_s:.0f} s: {self.last_words()}") from None
        await self._stop_watching()
        if status != 0:
            raise RunEndedError(f"the run ended with status {status}: {self.last_words()}")

    async def kill(self) -> None:
        """Leave nothing behind, in whatever state it is."""
        await self._stop_watching()
        if self._launcher is None or self._launcher.returncode is not None:
            return
        family: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(self._launcher.pid).children(recursive=True)
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
        with contextlib.suppress(TimeoutError, ProcessLookupError):
            self._launcher.terminate()
            await asyncio.wait_for(self._launcher.wait(), END_GRACE_S)
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        with contextlib.suppress(ProcessLookupError):
            self._launcher.kill()

    async def _stop_watching(self) -> None:
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ------------------------------------------------------------------ what is seen

    @property
    def config(self) -> Config:
        """The resolved configuration, ports included."""
        return load_config(self.folder.config)

    def roles(self) -> dict[str, psutil.Process]:
        """The living processes of the run's roles, by their names in the fleet."""
        assert self._launcher is not None
        found: dict[str, psutil.Process] = {}
        try:
            children = psutil.Process(self._launcher.pid).children()
        except psutil.NoSuchProcess:
            return {}
        for process in children:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                name = role_name(process.cmdline())
                if name is not None and process.status() != psutil.STATUS_ZOMBIE:
                    found[name] = process
        return found

    def steps(self) -> list[Line]:
        """The policy updates on record, oldest first."""
        try:
            return [line for line in read_metrics(self.folder.metrics) if "timing/step_s" in line]
        except FileNotFoundError:
            return []

    def last_words(self) -> str:
        """The last lines of the launcher's output."""
        lines = self._output.read_text(errors="replace").splitlines() if self._output.exists() else []
        return " | ".join([line.strip() for line in lines if line.strip()][-3:]) + f" (all: {self._output})"

    async def wait_for(self, reached: Callable[[], bool], timeout_s: float, what: str) -> None:
        """Look every moment until `reached`. Raises RunEndedError: the run ended, or it takes too long."""
        deadline = time.monotonic() + timeout_s
        while not reached():
            self.check_alive()
            if time.monotonic() > deadline:
                raise RunEndedError(f"waited {timeout_s:.0f} s for {what}: {self.last_words()}")
            await asyncio.sleep(0.2)

    def check_alive(self) -> None:
        """Raises RunEndedError: the launcher has ended."""
        assert self._launcher is not None
        if self._launcher.returncode is not None:
            raise RunEndedError(f"the run ended with status {self._launcher.returncode}: {self.last_words()}")

    # ------------------------------------------------------------------ watching

    async def _watch_record(self) -> None:
        """Restarts of roles, and steps that a killed learner had made after its last checkpoint."""
        newest = 0
        while True:
            for name, process in self.roles().items():
                if name in self._pids and self._pids[name] != process.pid:
                    self.restarts[name] += 1
                    self._say(name, "is back")
                self._pids[name] = process.pid
            steps = await asyncio.to_thread(self.steps)
            version = int(steps[-1]["version"]) if steps else 0
            if version < newest:
                self.steps_lost += newest - version
                self._say("learner", f"goes on from version {version}, {newest - version} steps are lost")
            newest = version
            await asyncio.sleep(LOOK_EVERY_S)

    async def _watch_queues(self) -> None:
        """The most bytes in the broker's queues at any look; a restarted broker is found again by the client."""
        broker, keys = self.config.broker, load_run_keys(self.folder.keys, "monitor")
        while True:
            client = BrokerClient(f"tcp://{broker.host}:{broker.port}", keys, "monitor", f"chaos-{os.getpid()}")
            try:
                await client.start()
            except BrokerUnreachableError:
                continue
            try:
                while True:
                    with contextlib.suppress(BrokerUnreachableError):
                        stages = (await client.fleet_status()).stages.values()
                        self.peak_queue_bytes = max(self.peak_queue_bytes, sum(stage.bytes for stage in stages))
                    await asyncio.sleep(LOOK_EVERY_S)
            finally:
                await client.close()
