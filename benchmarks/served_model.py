"""`deepretrieval serve` in a process of its own, for benchmarks and tests of what asks it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

START_S = 120


@dataclass
class Served:
    """A server that runs."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path


@contextlib.contextmanager
def served(log: Path, *words: str, key: str = "") -> Iterator[Served]:
    """Serve by these words of the command line, on a free port, until the block ends.

    Raises:
        RuntimeError: the server did not come up; with what it said.
    """
    command = [sys.executable, "-m", "deploy.cli", "serve", "--port", "0", *words]
    environment = {**os.environ, "DEEPRETRIEVAL_SERVE_KEY": key}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        yield Served(_url(process, log), process, log)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _url(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        said = log.read_text()
        if "Serving" in said and "\n" in said.partition("Serving")[2]:
            url = said.partition(" at ")[2].split()[0].rstrip("/")
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/health", timeout=5).read()
                return url
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode}: {said}")
        time.sleep(0.1)
    raise RuntimeError(f"not up after {START_S} s: {log.read_text()}")
