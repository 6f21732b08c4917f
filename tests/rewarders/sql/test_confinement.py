"""The guards without SQLite in between: what a worker could do if a query had taken it over."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = """
import os, socket, sys, threading, time, signal, ctypes, mmap, resource
from rewarders.sql.confinement import confine
from rewarders.sql.limits import SqlLimits

folder, outside, parent = sys.argv[1], sys.argv[2], int(sys.argv[3])
inside = os.path.join(folder, "inside.txt")
guards = confine(SqlLimits(heap_mb=64, memory_mb=256), (folder,))
print("guards", *guards, flush=True)
if "seccomp" not in guards:
    sys.exit(0)

def attempt(name, action):
    try:
        action()
    except BaseException as error:
        print(name, type(error).__name__)
    else:
        print(name, "done")

def raise_memory():
    resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))

attempt("read_inside", lambda: open(inside).read())
attempt("read_outside", lambda: open(outside).read())
attempt("read_password", lambda: open("/etc/passwd").read())
attempt("list_root", lambda: os.listdir("/"))
attempt("write_inside", lambda: open(inside, "w"))
attempt("append_inside", lambda: open(inside, "a"))
attempt("create", lambda: open(os.path.join(folder, "new.txt"), "x"))
attempt("read_and_write", lambda: os.open(inside, os.O_RDWR))
attempt("truncate", lambda: os.truncate(inside, 0))
attempt("remove", lambda: os.remove(inside))
attempt("rename", lambda: os.rename(inside, inside + "2"))
attempt("make_folder", lambda: os.mkdir(os.path.join(folder, "new")))
attempt("link", lambda: os.symlink(inside, os.path.join(folder, "link")))
attempt("chmod", lambda: os.chmod(inside, 0o777))
attempt("socket", lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM))
attempt("unix_socket", lambda: socket.socketpair())
attempt("fork", os.fork)
attempt("execute", lambda: os.execv("/bin/true", ["true"]))
attempt("thread", lambda: threading.Thread(target=print).start())
attempt("signal", lambda: os.kill(parent, 0))
attempt("memory", lambda: bytearray(400 << 20))
attempt("more_memory", raise_memory)
attempt("code", lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC))
attempt("clock", time.time)
sys.stdout.flush()
"""

_HARMLESS = {"read_inside", "clock"}
_KEPT_BY_LANDLOCK = {"read_outside", "read_password"}
_KERNEL_HAS_SECCOMP = Path("/proc/sys/kernel/seccomp/actions_avail").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="seccomp and Landlock are Linux's")
def test_a_conquered_worker_can_do_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "databases"
    folder.mkdir()
    inside, outside = folder / "inside.txt", tmp_path / "outside.txt"
    inside.write_text("data")
    outside.write_text("secret")
    mode = inside.stat().st_mode
    victim = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    arguments = [sys.executable, "-c", _SCRIPT, str(folder), str(outside), str(victim.pid)]
    try:
        result = subprocess.run(arguments, capture_output=True, text=True, cwd=Path(__file__).parents[3], timeout=60)
    finally:
        victim.communicate(b"\n")
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    guards, outcomes = set(lines[0][1:]), dict(lines[1:])
    if "seccomp" not in guards:
        assert not (_KERNEL_HAS_SECCOMP and platform.machine() in ("x86_64", "aarch64"))
        pytest.skip("this kernel lets a process install no seccomp filter")
    expected_done = _HARMLESS | (set() if "landlock" in guards else _KEPT_BY_LANDLOCK)
    assert {name for name, outcome in outcomes.items() if outcome == "done"} == expected_done
    assert len(outcomes) == 24
    assert [path.name for path in folder.iterdir()] == ["inside.txt"]
    assert inside.read_text() == "data"
    assert inside.stat().st_mode == mode
