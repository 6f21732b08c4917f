"""A run that is live: the launcher's lock on its folder, what it reports of its roles, and the fleet wished for.

Everything is a file in the run folder, so that it works from any machine that sees the folder:

* `launcher.lock` is held (flock) by the launcher while the run is live;
* `roles.json` is what the launcher knows of its roles, written once a second;
* `fleet.json` is the fleet that `deepretrieval scale` wishes for; the launcher looks at it twice a second.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path
from typing import Annotated

import msgspec

from common.tracking.jsonl import replace_file
from deploy.errors import LaunchError
from deploy.fleet_commands import MOST_ROLES
from deploy.role_states import RoleState

LOCK, REPORT, WISH = "launcher.lock", "roles.json", "fleet.json"
LOCK_PATIENCE_S = 1.0  # whoever only looks at a lock holds it for an instant

Count = Annotated[int, msgspec.Meta(ge=0, le=MOST_ROLES)]


class FleetWish(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How many actors and rewarders there are to be; None: as many as there are. `serial` grows with every wish."""

    serial: int
    actors: Count | None = None
    rewarders: Count | None = None


class RunReport(msgspec.Struct, frozen=True):
    """What the launcher knows: its roles, and the newest wish it has begun to fulfil."""

    roles: list[RoleState]
    wish: int = 0


class RunLock:
    """Held by the launcher of a run for as long as it lives; the kernel frees it however it dies.

    Raises (on entering):
        LaunchError: another launcher holds it.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK
        self._descriptor: int | None = None

    def __enter__(self) -> RunLock:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        deadline = time.monotonic() + LOCK_PATIENCE_S
        while not _try_lock(descriptor, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                holder = os.pread(descriptor, 256, 0).decode(errors="replace").strip()
                os.close(descriptor)
                raise LaunchError(
                    f"the run in {self._path.parent} is live already ({holder or 'another launcher'}): end that one "
                    "first, change it with `deepretrieval scale`, or choose another run.name"
                )
            time.sleep(0.05)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        self._descriptor = descriptor
        self._clear()  # an earlier launcher may have been killed
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            self._clear()
            os.close(self._descriptor)
            self._descriptor = None

    def _clear(self) -> None:
        for name in (WISH, REPORT):
            (self._path.parent / name).unlink(missing_ok=True)


def is_live(folder: Path) -> bool:
    """Whether a launcher holds the run's lock."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return not _try_lock(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def write_wish(folder: Path, actors: int | None, rewarders: int | None) -> FleetWish:
    """Ask the launcher of a run for a fleet of this size."""
    wish = FleetWish(time.time_ns(), actors, rewarders)
    replace_file(folder / WISH, msgspec.json.encode(wish), durable=False)
    return wish


def read_wish(folder: Path) -> FleetWish | None:
    """The newest wish; None where there is none. Raises LaunchError: the file is no wish."""
    try:
        return msgspec.json.decode((folder / WISH).read_bytes(), type=FleetWish)
    except FileNotFoundError:
        return None
    except msgspec.MsgspecError as error:
        raise LaunchError(f"{folder / WISH} cannot be read ({error}): use `deepretrieval scale`") from None


def write_report(folder: Path, report: RunReport) -> None:
    """Tell what the launcher knows. Raises OSError."""
    replace_file(folder / REPORT, msgspec.json.encode(report), durable=False)


def read_report(folder: Path) -> RunReport | None:
    """The launcher's newest report; None where there is none (yet)."""
    try:
        return msgspec.json.decode((folder / REPORT).read_bytes(), type=RunReport)
    except (FileNotFoundError, msgspec.MsgspecError):
        return None
