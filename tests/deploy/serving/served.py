"""`deepretrieval serve` in a process of its own."""

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

SETTINGS = ("task.prompt=short", "sampling.max_tokens=24", "actor.max_model_len=256")
START_S = 120


@dataclass
class Served:
    """A server that runs."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path


@contextlib.contextmanager
def served(model: Path, corpus: Path, log: Path, *words: str, key: str = "") -> Iterator[Served]:
    """Serve a model until the block ends; fails where it does not start."""
    command = [sys.executable, "-m", "deploy.cli", "serve", "--model", str(model), "--corpus", str(corpus)]
    environment = {**os.environ, "DEEPRETRIEVAL_SERVE_KEY": key}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--port", "0", *SETTINGS, *words], stdout=output, stderr=subprocess.STDOUT, env=environment
        )
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
        assert process.poll() is None, said
        time.sleep(0.1)
    raise AssertionError(f"not up after {START_S} s: {log.read_text()}")
