"""Landlock (Linux 5.13 and newer): the process sees no file outside the folders of the databases.

See landlock(7) for the structures, and linux/landlock.h for the numbers.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from typing import Any, Final

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_ASK_VERSION, _PATH_BENEATH = 1, 1
_READ_FILE, _READ_FOLDER = 1 << 2, 1 << 3
# Number of file rights, network rights and scopes that each version of the interface knows, oldest first.
_RIGHTS: Final = ((13, 0, 0), (14, 0, 0), (15, 0, 0), (15, 2, 0), (16, 2, 0), (16, 2, 2))


class _Ruleset(ctypes.Structure):
    """struct landlock_ruleset_attr."""

    _fields_ = (("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scopes", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    """struct landlock_path_beneath_attr."""

    _pack_ = 1
    _fields_ = (("rights", ctypes.c_uint64), ("folder", ctypes.c_int32))


def see_only(folders: Sequence[str]) -> bool:
    """Let this process read below `folders` and nowhere else, for the rest of its life; write and connect nowhere.

    False where the kernel has no Landlock. Raises OSError if a folder cannot be opened. The caller has set "no new
    privileges".
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    version = _call(libc, _CREATE_RULESET, None, 0, _ASK_VERSION)
    if version < 1:
        return False
    files, network, scopes = _RIGHTS[min(version, len(_RIGHTS)) - 1]
    ruleset = _Ruleset((1 << files) - 1, (1 << network) - 1, (1 << scopes) - 1)
    size = 8 * (1 + bool(network) + bool(scopes))
    descriptor = _call(libc, _CREATE_RULESET, ctypes.byref(ruleset), size, 0)
    if descriptor < 0:
        return False
    try:
        for folder in folders:
            _allow(libc, descriptor, folder)
        return _call(libc, _RESTRICT_SELF, descriptor, 0) == 0
    finally:
        os.close(descriptor)


def _allow(libc: ctypes.CDLL, ruleset: int, folder: str) -> None:
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY)  # type: ignore[attr-defined,unused-ignore]
    try:
        rule = _PathBeneath(_READ_FILE | _READ_FOLDER, descriptor)
        if _call(libc, _ADD_RULE, ruleset, _PATH_BENEATH, ctypes.byref(rule), 0) != 0:
            raise OSError(ctypes.get_errno(), f"cannot limit the worker to {folder}")
    finally:
        os.close(descriptor)


def _call(libc: ctypes.CDLL, number: int, *arguments: Any) -> int:
    """Make a system call that the C library has no name for; -1 on failure."""
    words = (ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments)
    return int(libc.syscall(ctypes.c_long(number), *words))
