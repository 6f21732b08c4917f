"""What each process of a run is doing, told through one small file per role in `runs/<name>/status/`.

The live display reads them, from the first second on: a role can report before it has any connection.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.tracking.jsonl import replace_file

_LEAST_INTERVAL_S = 0.2


class RoleReporter:
    """Says what one role is doing; cheap enough to be called in a loop, and never an error for its caller.

    Args:
        folder: `runs/<name>/status`.
        name: of the role, unique in the run (`actor-0`).
        clock: seconds since the epoch.
    """

    def __init__(self, folder: str | Path, name: str, clock: Callable[[], float] = time.time) -> None:
        self._path = Path(folder) / f"{name}.json"
        self._name = name
        self._clock = clock
        self._known: tuple[str, str, str] | None = None
        self._since = self._written = float("-inf")

    def report(self, state: str, phase: str = "", *, fraction: float | None = None, waits_for: str = "") -> None:
        """State (`starting`, `running`, `stalled`, `stopped`), phase in words, share of it that is done.

        A new state or phase is written at once; a new fraction of the same phase five times a second at most.
        """
        now, known = self._clock(), (state, phase, waits_for)
        if known != self._known:
            self._known, self._since = known, now
        elif now - self._written < _LEAST_INTERVAL_S:
            return
        self._written = now
        record = {
            "name": self._name,
            "pid": os.getpid(),
            "state": state,
            "phase": phase,
            "fraction": fraction,
            "waits_for": waits_for,
            "since": self._since,
        }
        with contextlib.suppress(OSError):  # a full disk shows where it matters: in metrics and checkpoints
            replace_file(self._path, json.dumps(record).encode(), durable=False)


def read_roles(folder: str | Path, clock: Callable[[], float] = time.time) -> list[dict[str, Any]]:
    """The newest report of every role on this host, by name, as `build_state` takes them under `roles`.

    A process that is gone without having said `stopped` is reported as `dead`.
    """
    roles = []
    for path in sorted(Path(folder).glob("*.json")):
        try:
            role = json.loads(path.read_bytes())
            since, gone = float(role.pop("since")), not _alive(int(role["pid"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # replaced or removed while being read; the next refresh sees it
        role["since_s"] = max(0.0, clock() - since)
        if gone and role.get("state") != "stopped":
            role["state"] = "dead"
        roles.append(role)
    return roles


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not _is_zombie(pid)


def _is_zombie(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:  # no /proc on this system
        return False
    return stat.rpartition(")")[2].split()[0] == "Z"
