"""Processes of a run: ended with their children, and never left behind by a launcher that was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from common.messages import PeerEntry, PeerStatus, StageStatus, StatusReply
from deploy.processes import RoleProcess
from deploy.role_states import role_states

ROOT = Path(__file__).parents[2]


def search_server(tmp_path: Path) -> RoleProcess:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "corpus.jsonl").write_text('{"_id": "1", "title": "heart", "text": "x"}\n')
    arguments = ("search-server", "pubmed", "--corpus", str(corpus), "--port", "0")
    environment = {"PYTHONPATH": str(ROOT), "DEEPRETRIEVAL_CACHE": str(tmp_path / "cache")}
    return RoleProcess("search-server", arguments, tmp_path / "logs" / "s.log", environment)


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
    process.signal(signal.SIGSTOP)
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
        "    print(process.process.pid, flush=True)\n"
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


def test_restarts_are_counted(tmp_path: Path) -> None:
    process = search_server(tmp_path)
    process.started_at = time.monotonic()
    assert [process.may_restart() for _ in range(6)] == [True] * 5 + [False]
    process.started_at = time.monotonic() - 1000
    assert process.may_restart(), "a role that ran long starts counting anew"


def test_a_stalled_role_is_named_with_what_it_waits_for(tmp_path: Path) -> None:
    process = search_server(tmp_path)
    stages = {"rollout": StageStatus(0, 0, 0, 0, 0)}
    (starting,) = role_states([process], None)
    assert starting["state"] == "running", "the search server reports nowhere"
    process.name = "actor-0"
    assert role_states([process], None)[0]["state"] == "starting"
    waiting = PeerEntry("actor-0", "actor", 0, 0.1, PeerStatus("generating", "tickets", 40.0))
    fleet = StatusReply(stages, (waiting,), 0, 0, 0)  # type: ignore[arg-type]
    (state,) = role_states([process], fleet)
    assert (state["state"], state["waits_for"]) == ("stalled", "tickets")
    silent = PeerEntry("actor-0", "actor", 0, 20.0, PeerStatus("generating", "", 0.0))
    (state,) = role_states([process], StatusReply(stages, (silent,), 0, 0, 0))  # type: ignore[arg-type]
    assert (state["state"], state["waits_for"]) == ("stalled", "a sign of life")
