"""What a worker takes away from itself before it runs the first query, and cannot get back."""

from __future__ import annotations

import contextlib
import ctypes
import math
import resource
import sys
import time

from rewarders.sql.landlock import see_only
from rewarders.sql.limits import SqlLimits
from rewarders.sql.seccomp import filter_system_calls

_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 4, 38
_SPARE_CPU_SECONDS = 2


def confine(limits: SqlLimits, folders: tuple[str, ...]) -> tuple[str, ...]:
    """Lock this process up and say with what: names of the guards that this system has.

    Limits of memory, files and children work on every Unix (macOS ignores some); "landlock" and "seccomp" are Linux's.
    Raises OSError if a folder cannot be opened.
    """
    guards = [name for name, kind, value in _resource_limits(limits) if _limit(kind, value)]
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        # No core dump and no debugger of the same user; no setuid program, which the two guards below ask for.
        for option, value in ((_PR_SET_DUMPABLE, 0), (_PR_SET_NO_NEW_PRIVS, 1)):
            libc.prctl(option, *map(ctypes.c_ulong, (value, 0, 0, 0)))
        if folders and see_only(folders):
            guards.append("landlock")
        if filter_system_calls():
            guards.append("seccomp")
    return tuple(guards)


def allow_cpu(seconds: float) -> None:
    """Let the process use this much more processor time, and a little; then the kernel ends it.

    The pool kills a late worker anyway; this is for a worker whose pool has died.
    """
    soft = math.ceil(time.process_time() + seconds) + _SPARE_CPU_SECONDS
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def _resource_limits(limits: SqlLimits) -> tuple[tuple[str, int, int], ...]:
    return (
        ("memory", resource.RLIMIT_AS, limits.memory_mb << 20),
        ("no_written_files", resource.RLIMIT_FSIZE, 0),
        ("few_open_files", resource.RLIMIT_NOFILE, 16),
        ("no_children", resource.RLIMIT_NPROC, 0),  # does not bind root
        ("no_core_dump", resource.RLIMIT_CORE, 0),
    )


def _limit(kind: int, value: int) -> bool:
    try:
        resource.setrlimit(kind, (value, value))
    except (ValueError, OSError):
        return False
    return True
