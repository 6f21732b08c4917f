"""The ranks of a learner on this host: started together, and ended together as soon as one of them fails.

torchrun would do for starting them. But it waits half a minute for ranks that hang in a collective, cuts off a
checkpoint that takes as long, and blames the rank whose end it sees first, which often is one that only lost its
peer. The variables given to the ranks are torchrun's, so that they run under either.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

LOOPBACK = "127.0.0.1"
POLL_S = 0.05
SETTLE_S = 0.3  # between the first sign of a failure and the verdict: what fails later is its consequence
LAST_WORDS_S = 5.0  # to log a traceback, for a rank that has failed
LEAVE_WITHIN_S = 30.0  # of the end of the first rank, which ended well
ENDS_WELL = (0, 130)  # 130: saved and ended because it was asked to


class Rank:
    """One process of the learner."""

    def __init__(self, command: Sequence[str], number: int, environment: dict[str, str], record: Path) -> None:
        own = {"RANK": str(number), "LOCAL_RANK": str(number), "TORCHELASTIC_ERROR_FILE": str(record)}
        self.number = number
        self.process = subprocess.Popen(command, env={**os.environ, **environment, **own})
        self._record = record
        self._seen_dead = 0.0

    @property
    def failed(self) -> bool:
        """Whether it has ended otherwise than well, or is about to."""
        status = self.process.poll()
        if status not in (None, *ENDS_WELL) and not self._seen_dead:
            self._seen_dead = time.time()
        return bool(self._seen_dead) or self._record.exists()

    @property
    def killed(self) -> bool:
        """Whether it was ended from outside. SIGABRT is what the process does itself, as NCCL's watchdog."""
        status = self.process.poll()
        return status is not None and status < 0 and status != -signal.SIGABRT

    @property
    def failed_at(self) -> float:
        """Time of day in seconds."""
        return self._record.stat().st_mtime if self._record.exists() else self._seen_dead

    def describe(self) -> str:
        """How it failed, in one line."""
        status, who = self.process.poll(), f"rank {self.number} (process {self.process.pid})"
        if self.killed and status is not None:
            why = ": did memory run out? `dmesg` shows it" if status == -signal.SIGKILL else ""
            return f"{who} was killed by {signal.Signals(-status).name}{why}"
        if self._record.exists():
            return f"{who} failed: {_recorded_message(self._record)}"
        return f"{who} ended with status {status}"


def run_ranks(command: Sequence[str], count: int) -> int:
    """Run `command` as `count` ranks until all have ended; SIGTERM and SIGINT reach rank 0, which tells the others.

    The first failure ends all others at once, and is told in one line on stderr.

    Returns:
        The status of rank 0; 1 where a rank failed, 128 + N where signal N came twice.

    Raises:
        OSError: a process could not be started.
    """
    from torch._C._distributed_c10d import TCPStore  # takes seconds: only where there are ranks

    # Here, not in rank 0: the port is free for certain, and the store outlives every rank.
    store = TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False)
    environment = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    with tempfile.TemporaryDirectory(prefix="deepretrieval-ranks-") as records:
        ranks: list[Rank] = []
        try:
            for number in range(count):
                ranks.append(Rank(command, number, environment, Path(records) / f"rank-{number}.json"))
            return _Watch(ranks).run()
        finally:
            _kill(ranks)


class _Watch:
    def __init__(self, ranks: list[Rank]) -> None:
        self._ranks = ranks
        self._lead = ranks[0].process
        self._asked_by: list[int] = []

    def run(self) -> int:
        before = {number: signal.signal(number, self._ask_to_stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            return self._until_end()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask_to_stop(self, number: int, _frame: object) -> None:
        self._asked_by.append(number)
        if len(self._asked_by) == 1:
            self._lead.terminate()

    def _until_end(self) -> int:
        leave_by = float("inf")
        while any(rank.process.poll() is None for rank in self._ranks) and time.monotonic() < leave_by:
            if len(self._asked_by) > 1:
                return 128 + self._asked_by[-1]
            # Rank 0 ends well when all is done and the others are dismissed: no failure counts any more.
            if self._lead.poll() not in ENDS_WELL and any(rank.failed for rank in self._ranks):
                return self._fail()
            if any(rank.process.poll() is not None for rank in self._ranks):
                leave_by = min(leave_by, time.monotonic() + LEAVE_WITHIN_S)
            time.sleep(POLL_S)
        if self._lead.returncode in ENDS_WELL:
            return self._lead.returncode
        return self._fail()

    def _fail(self) -> int:
        """Find who failed first, let it finish its log, and say so."""
        time.sleep(SETTLE_S)
        failed = [rank for rank in self._ranks if rank.failed]
        early = [rank for rank in self._ranks if rank.process.poll() is not None]  # ended well, but too early
        culprit = min(failed or early, key=lambda rank: (not rank.killed, rank.failed_at))
        deadline = time.monotonic() + LAST_WORDS_S
        while culprit.process.poll() is None and time.monotonic() < deadline:
            time.sleep(POLL_S)
        words = culprit.describe()
        _kill(self._ranks)
        print(words, file=sys.stderr, flush=True)
        if self._asked_by and self._lead.returncode == -signal.SIGTERM:
            return 128 + signal.SIGTERM  # it was asked before it could listen
        return 1


def _kill(ranks: Sequence[Rank]) -> None:
    for rank in ranks:
        rank.process.kill()
    for rank in ranks:
        rank.process.wait()


def _recorded_message(record: Path) -> str:
    """Type and text of the exception, on one line."""
    try:
        message = json.loads(record.read_text())["message"]["message"]
    except (OSError, ValueError, KeyError, TypeError):  # it died while it wrote
        return "its record of the failure cannot be read; its traceback is above"
    return " ".join(str(message).split())
