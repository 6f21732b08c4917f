"""The process of a role: started, watched, ended with all its children; none is ever left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from deploy.supervisor import Role

# glibc gives large blocks back to the kernel and faults them in again at every step; keeping them makes small
# models on a CPU train two to four times faster where page faults are dear (virtual machines).
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
ERROR_PREFIX = "error: "  # of the one line a role leaves when it ends by an error the user can mend
POLL_S = 0.02
_TAIL_BYTES = 1 << 16  # of a log, where last words are looked for
_WORDS_CHARACTERS = 1000


@dataclass(frozen=True)
class RoleSpec:
    """How a role is started, on whatever machine.

    Attributes:
        arguments: of `deepretrieval`.
        cpus, gpus: what it needs of a cluster; means nothing on this machine.
        home: it has to run where the launcher runs, because others know its address.
    """

    name: str
    arguments: tuple[str, ...]
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    cpus: float = 1.0
    gpus: float = 0.0
    home: bool = False


class ChildProcess:
    """One process at a time, in a session of its own: Ctrl-C in the terminal reaches the launcher only.

    Args:
        parent_grace_s: how long it may tidy up after this process was killed.
    """

    def __init__(self, spec: RoleSpec, parent_grace_s: float) -> None:
        parent = ("--parent", str(os.getpid()), "--parent-grace", str(parent_grace_s))
        self.command: tuple[str, ...] = (sys.executable, "-m", "deploy.cli", *spec.arguments, *parent)
        self._spec = spec
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0
        self._killed = False

    def start(self) -> None:
        """Start it; whatever an earlier one left running is ended first. Raises OSError."""
        self.kill()
        spec = self._spec
        spec.log.parent.mkdir(parents=True, exist_ok=True)
        self._log_start = spec.log.stat().st_size if spec.log.exists() else 0
        with spec.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **spec.environment},
                start_new_session=True,
            )
        self._killed = False

    @property
    def pid(self) -> int | None:
        """Of the newest process."""
        return self._process.pid if self._process is not None else None

    @property
    def returncode(self) -> int | None:
        """Exit status of the newest process; None while it runs or before the first."""
        return self._process.poll() if self._process is not None else None

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def signal(self, number: int) -> None:
        """Send a signal to the process itself."""
        if self._process is not None and self.running:
            self._process.send_signal(number)

    def kill(self) -> None:
        """End its whole process group at once: engine processes and ranks too, even if it has ended itself."""
        if self._process is None or (self._killed and not self.running):
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._killed = True  # once is enough: later, the number may be that of somebody else's group

    def error(self) -> str:
        """The error the user can mend that it ended by, without the prefix; "" where there is none."""
        lines = (line for line in reversed(self._lines()) if line.startswith(ERROR_PREFIX))
        return next(lines, "").removeprefix(ERROR_PREFIX)

    def last_words(self) -> str:
        """That error, or else the last line of its log since its start."""
        return self.error() or next((line for line in reversed(self._lines()) if any(map(str.isalnum, line))), "")

    def _lines(self) -> list[str]:
        try:
            with self._spec.log.open("rb") as log:
                size = log.seek(0, os.SEEK_END)
                log.seek(max(self._log_start, size - _TAIL_BYTES))
                lines = log.read().decode(errors="replace").splitlines()
        except OSError:
            return []
        return [line.strip()[:_WORDS_CHARACTERS] for line in lines if line.strip()]


class LocalRole(Role):
    """A role whose process is a child of this one."""

    def __init__(self, spec: RoleSpec, parent_grace_s: float = 10.0) -> None:
        super().__init__(spec.name, spec.log)
        self.child = ChildProcess(spec, parent_grace_s)

    async def start(self) -> None:
        self.child.start()

    @property
    def returncode(self) -> int | None:
        return self.child.returncode

    @property
    def running(self) -> bool:
        return self.child.running

    @property
    def pid(self) -> int | None:
        return self.child.pid

    def error(self) -> str:
        return self.child.error()

    def last_words(self) -> str:
        return self.child.last_words()

    async def stop(self, grace_s: float) -> None:
        self.child.signal(signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        while self.running and time.monotonic() < deadline:
            await asyncio.sleep(POLL_S)
        self.child.kill()
        while self.running:
            await asyncio.sleep(POLL_S)
