"""Ranks are started and ended together, and the one that failed first is named. Real processes, without torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deploy.ranks import run_ranks

ROOT = Path(__file__).parents[2]
PRELUDE = """
import json, os, signal, sys, time
rank = int(os.environ["RANK"])
def record(text):
    with open(os.environ["TORCHELASTIC_ERROR_FILE"], "w") as file:
        json.dump({"message": {"message": text, "extraInfo": {}}}, file)
"""
ENDED_WITHIN_S = 60.0  # of the ten minutes that the others would wait


def ranks(script: str, count: int = 2) -> int:
    return run_ranks([sys.executable, "-c", PRELUDE + script], count)


@pytest.mark.parametrize("status", [0, 130])
def test_the_status_is_that_of_rank_0(status: int) -> None:
    assert ranks(f"sys.exit({status} if rank == 0 else 0)") == status


def test_ranks_are_told_who_they_are_and_where_they_meet(tmp_path: Path) -> None:
    script = f"open(r'{tmp_path}/%d' % rank, 'w').write(' '.join(os.environ[name] for name in NAMES.split()))"
    names = "NAMES = 'LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT'\n"
    assert ranks(names + script) == 0
    told = [(tmp_path / str(rank)).read_text().split() for rank in range(2)]
    assert [each[:3] for each in told] == [["0", "2", "127.0.0.1"], ["1", "2", "127.0.0.1"]]
    assert told[0][3] == told[1][3]


def test_a_rank_that_is_killed_ends_those_that_wait(capfd: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    assert ranks("os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else time.sleep(600)") == 1
    assert time.monotonic() - began < ENDED_WITHIN_S
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("rank 1 (process ")
    assert "was killed by SIGKILL" in last


def test_the_failure_recorded_first_is_told_though_another_rank_ends_before(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    script = f"""
seen = r"{tmp_path / "seen"}"
if rank == 1:
    record("OutOfMemoryError: 3 GiB\\nare missing")
    open(seen, "w").close()
    time.sleep(0.5)
    sys.exit(1)
while not os.path.exists(seen):
    time.sleep(0.01)
time.sleep(0.05)
record("RuntimeError: connection closed by peer")
sys.exit(1)
"""
    assert ranks(script) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("rank 1 (process ")
    assert last.endswith("failed: OutOfMemoryError: 3 GiB are missing")


def test_a_rank_that_fails_and_then_hangs_is_ended_too(capfd: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    assert ranks("record('ValueError: no') if rank == 0 else None\ntime.sleep(600)") == 1
    assert time.monotonic() - began < ENDED_WITHIN_S
    assert capfd.readouterr().err.splitlines()[-1].endswith("failed: ValueError: no")


def test_a_rank_that_ends_by_itself_is_told_with_its_status(capfd: pytest.CaptureFixture[str]) -> None:
    assert ranks("sys.exit(3) if rank == 1 else time.sleep(600)") == 1
    assert capfd.readouterr().err.splitlines()[-1].endswith("ended with status 3")


def test_what_happens_after_rank_0_has_ended_well_does_not_matter(capfd: pytest.CaptureFixture[str]) -> None:
    assert ranks("time.sleep(0.5) or sys.exit(3) if rank == 1 else sys.exit(0)") == 0
    assert capfd.readouterr().err == ""


def test_a_rank_that_leaves_before_the_others_ends_them(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.ranks.LEAVE_WITHIN_S", 0.5)
    assert ranks("time.sleep(600) if rank == 0 else sys.exit(130)") == 1
    assert capfd.readouterr().err.splitlines()[-1].endswith("ended with status 130")


STOPPABLE = """
def stop(number, frame):
    if rank == 0:
        open(sys.argv[1] + "/asked", "a").write("x")
        if len(sys.argv) == 2:
            time.sleep(0.3)
            open(sys.argv[1] + "/left", "w").close()
            sys.exit(130)
signal.signal(signal.SIGTERM, stop)
open(sys.argv[1] + "/ready-%d" % rank, "w").close()
while not os.path.exists(sys.argv[1] + "/left"):
    time.sleep(0.02)
"""


def run_and_signal(folder: Path, signals: int, *arguments: str) -> int:
    """`run_ranks` in a process of its own, which gets SIGTERM `signals` times once its ranks are ready."""
    call = "import sys; from deploy.ranks import run_ranks; sys.exit(run_ranks({}, 2))"
    command = [sys.executable, "-c", PRELUDE + STOPPABLE, str(folder), *arguments]
    outer = subprocess.Popen([sys.executable, "-c", call.format(command)], env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        for count in range(signals):
            needed = ["ready-0", "ready-1", *(["asked"] if count else [])]
            while not all((folder / name).exists() for name in needed):
                assert outer.poll() is None
                time.sleep(0.02)
            outer.send_signal(signal.SIGTERM)
        return outer.wait(timeout=60)
    finally:
        outer.kill()


def test_a_request_to_stop_reaches_rank_0_which_may_take_its_time(tmp_path: Path) -> None:
    assert run_and_signal(tmp_path, 1) == 130
    assert (tmp_path / "asked").read_text() == "x"


def test_a_second_request_ends_everything_at_once(tmp_path: Path) -> None:
    assert run_and_signal(tmp_path, 2, "stay") == 143
