"""A seccomp filter (Linux): the process may read files, use memory and answer on its pipes, nothing else.

No socket, no new process, no file opened for writing, no signal to anyone. The list names the system calls that Python
and SQLite make to run a query; every other one fails with EPERM, which both take for an ordinary error. See seccomp(2)
and linux/filter.h for the numbers.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from typing import Final

import msgspec

_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_LOAD, _JUMP_EQUAL, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _KILL, _EPERM = 0x7FFF0000, 0x80000000, 0x00050001
_NR_OFFSET, _ARCH_OFFSET, _ARGS_OFFSET = 0, 4, 16

_WRITING: Final = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_PROT_EXEC: Final = 4
_ANY_PID: Final = 0xFFFFFFFF
# Calls that are allowed only while these bits of an argument are zero: (argument, bits).
_CONDITIONS: Final = {
    "open": (1, _WRITING),
    "openat": (2, _WRITING),
    "mmap": (2, _PROT_EXEC),
    "mprotect": (2, _PROT_EXEC),
    "prlimit64": (0, _ANY_PID),
}


class _Machine(msgspec.Struct, frozen=True):
    """audit: the architecture's AUDIT_ARCH number. calls: system call numbers by name."""

    audit: int
    calls: dict[str, int]


def _numbers(table: str) -> dict[str, int]:
    pairs = (entry.split("=") for entry in table.split())
    return {name: int(number) for name, number in pairs}


_MACHINES: Final = {
    "x86_64": _Machine(
        0xC000003E,
        _numbers(
            """
            read=0 write=1 open=2 close=3 stat=4 fstat=5 lstat=6 poll=7 lseek=8 mmap=9 mprotect=10 munmap=11 brk=12
            rt_sigaction=13 rt_sigprocmask=14 rt_sigreturn=15 pread64=17 readv=19 writev=20 access=21 sched_yield=24
            mremap=25 madvise=28 nanosleep=35 getpid=39 exit=60 uname=63 fcntl=72 getcwd=79 readlink=89
            gettimeofday=96 getrlimit=97 getrusage=98 sysinfo=99 times=100 getuid=102 getgid=104 geteuid=107
            getegid=108 sigaltstack=131 setrlimit=160 gettid=186 time=201 futex=202 restart_syscall=219
            clock_gettime=228 clock_getres=229 clock_nanosleep=230 exit_group=231 openat=257 newfstatat=262
            readlinkat=267 faccessat=269 ppoll=271 set_robust_list=273 prlimit64=302 getrandom=318 membarrier=324
            statx=332 rseq=334 faccessat2=439
            """
        ),
    ),
    "aarch64": _Machine(
        0xC00000B7,
        _numbers(
            """
            getcwd=17 fcntl=25 faccessat=48 openat=56 close=57 lseek=62 read=63 write=64 readv=65 writev=66 pread64=67
            ppoll=73 readlinkat=78 newfstatat=79 fstat=80 exit=93 exit_group=94 futex=98 set_robust_list=99
            nanosleep=101 clock_gettime=113 clock_getres=114 clock_nanosleep=115 sched_yield=124 restart_syscall=128
            sigaltstack=132 rt_sigaction=134 rt_sigprocmask=135 rt_sigreturn=139 times=153 uname=160 getrlimit=163
            setrlimit=164 getrusage=165 gettimeofday=169 getpid=172 getuid=174 geteuid=175 getgid=176 getegid=177
            gettid=178 sysinfo=179 brk=214 munmap=215 mremap=216 mmap=222 mprotect=226 madvise=233 prlimit64=261
            getrandom=278 membarrier=283 statx=291 rseq=293 faccessat2=439
            """
        ),
    ),
}


class _Instruction(ctypes.Structure):
    """struct sock_filter."""

    _fields_ = (
        ("code", ctypes.c_uint16),
        ("if_true", ctypes.c_uint8),
        ("if_false", ctypes.c_uint8),
        ("value", ctypes.c_uint32),
    )


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_uint16), ("first", ctypes.POINTER(_Instruction)))


def filter_system_calls() -> bool:
    """Install the filter for the rest of the process's life. False where this system or machine has none.

    The caller has set "no new privileges", without which an ordinary user may not do this.
    """
    machine = _MACHINES.get(platform.machine())
    if sys.platform != "linux" or machine is None or sys.maxsize < 1 << 32:
        return False
    instructions = [_Instruction(*fields) for fields in _program(machine)]
    array = (_Instruction * len(instructions))(*instructions)
    program = _Program(len(instructions), array)
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (_SECCOMP_MODE_FILTER, ctypes.addressof(program), 0, 0)
    return bool(libc.prctl(_PR_SET_SECCOMP, *map(ctypes.c_ulong, arguments)) == 0)


def _program(machine: _Machine) -> Iterator[tuple[int, int, int, int]]:
    """Yield instructions as (code, jump if true, jump if false, value); jumps count instructions to skip."""
    yield _LOAD, 0, 0, _ARCH_OFFSET
    yield _JUMP_EQUAL, 1, 0, machine.audit
    yield _RETURN, 0, 0, _KILL
    yield _LOAD, 0, 0, _NR_OFFSET
    for name, number in machine.calls.items():
        condition = _CONDITIONS.get(name)
        if condition is None:
            yield _JUMP_EQUAL, 0, 1, number
            yield _RETURN, 0, 0, _ALLOW
        else:
            argument, bits = condition
            yield _JUMP_EQUAL, 0, 4, number
            yield _LOAD, 0, 0, _ARGS_OFFSET + 8 * argument
            yield _JUMP_ANY_BIT, 0, 1, bits
            yield _RETURN, 0, 0, _EPERM
            yield _RETURN, 0, 0, _ALLOW
    yield _RETURN, 0, 0, _EPERM
