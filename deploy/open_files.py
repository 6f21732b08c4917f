"""How many files and sockets a process may have open."""

from __future__ import annotations

import contextlib

# A rewarder with some thousand requests in flight, each on a socket of its own, and room for its files.
ENOUGH = 8192
_MOST = 1 << 20  # where the system names no limit, some still refuse to be asked for none


def allow_open_files() -> None:
    """Raise the soft limit of this process, and of those it starts, to its hard limit.

    The usual soft limit of 1,024 is there for programs that use `select`, which none of ours does.
    """
    with contextlib.suppress(ImportError, ValueError, OSError):  # not on Windows; refused by some sandboxes
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = _MOST if hard == resource.RLIM_INFINITY else hard
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def open_files_allowed() -> int | None:
    """Open files a process may have once it has asked for them (its hard limit); None: no limit, or none known."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if hard == resource.RLIM_INFINITY else hard
