"""Processes of a run: ended with their children, and never left behind by a launcher that was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from deploy.processes import LocalRole, RoleSpec

ROOT = Path(__file__).parents[2]


def search_server(tmp_path: Path) -> LocalRole:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "corpus.jsonl").write_text('{"_id": "1", "title": "heart", "text": "x"}\n')
    arguments = ("search-server", "pubmed", "--corpus", str(corpus), "--port", "0")
    environment = {"PYTHONPATH": str(ROOT), "DEEPRETRIEVAL_CACHE": str(tmp_path / "cache")}
    return LocalRole(RoleSpec("search-server", arguments, tmp_path / "logs" / "s.log", environment))


def wait_for_line(log: Path, text: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not (log.exists() and text in log.read_text()):
        assert time.monotonic() < deadline, log.read_text() if log.exists() else "no log"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_a_role_starts_logs_and_stops(tmp_path: Path) -> None:
    process = search_server(tmp_path)
    assert not process.running
    await process.start()
    wait_for_line(process.log, "PubMed search server")
    assert process.running
    await process.stop(grace_s=10)
    assert process.returncode == 0
    assert "PubMed search server" in process.last_words()


async def test_a_role_that_ignores_the_request_is_killed(tmp_path: Path) -> None:
    process = search_server(tmp_path)
    await process.start()
    wait_for_line(process.log, "PubMed search server")
    process.child.signal(signal.SIGSTOP)
    began = time.monotonic()
    await process.stop(grace_s=0.5)
    assert time.monotonic() - began < 5
    assert process.returncode == -signal.SIGKILL


def test_roles_end_when_their_launcher_is_killed(tmp_path: Path) -> None:
    code = (
        "import asyncio, sys\nsys.path.insert(0, sys.argv[2])\nfrom pathlib import Path\n"
        "from test_processes import search_server\n"
        "async def main():\n"
        "    process = search_server(Path(sys.argv[1]))\n"
        "    await process.start()\n"
        "    print(process.pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    launcher = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment)
    assert launcher.stdout is not None
    role = int(launcher.stdout.readline())
    wait_for_line(tmp_path / "logs" / "s.log", "PubMed search server")
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 15
    while alive(role):
        assert time.monotonic() < deadline, "the role outlived its launcher"
        time.sleep(0.1)
