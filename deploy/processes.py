"""The processes of a run on this machine: started, watched, restarted, ended; none is ever left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

# glibc gives large blocks back to the kernel and faults them in again at every step; keeping them makes small
# models on a CPU train two to four times faster where page faults are dear (virtual machines).
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
RESTARTS_ALLOWED = 5
RESTART_FORGIVEN_S = 300.0  # a role that ran so long before it died starts counting anew


@dataclass
class RoleProcess:
    """One process of a run and how it is (re)started."""

    name: str
    arguments: Sequence[str]
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    process: asyncio.subprocess.Process | None = None
    restarts: int = 0
    started_at: float = 0.0

    async def start(self) -> None:
        """Start it in a session of its own: Ctrl-C in the terminal reaches the launcher only."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.started_at = time.monotonic()
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "deploy.cli",
                *self.arguments,
                "--parent",
                str(os.getpid()),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.environment},
                start_new_session=True,
            )

    @property
    def running(self) -> bool:
        """Whether it has been started and has not ended."""
        return self.process is not None and self.process.returncode is None

    @property
    def returncode(self) -> int | None:
        """Exit status; None while it runs."""
        return self.process.returncode if self.process is not None else None

    def may_restart(self) -> bool:
        """Count a death; False after too many in a row."""
        if time.monotonic() - self.started_at > RESTART_FORGIVEN_S:
            self.restarts = 0
        self.restarts += 1
        return self.restarts <= RESTARTS_ALLOWED

    def last_words(self) -> str:
        """The last line of its log: the one-line error of a role that gave up."""
        try:
            lines = self.log.read_text(errors="replace").splitlines()
        except OSError:
            return ""
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def signal(self, number: int) -> None:
        """Send a signal to its whole process group."""
        if self.process is not None and self.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, then SIGKILL after `grace_s` seconds; children of the process included."""
        if self.process is None:
            return
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                self.process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.process.wait(), grace_s)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        await self.process.wait()


async def stop_all(processes: Sequence[RoleProcess], grace_s: float) -> None:
    """End several processes at the same time."""
    await asyncio.gather(*(process.stop(grace_s) for process in processes))
