"""Which rank is stuck: each posts how far it has come, and whoever waits too long says whom it waits for.

A collective that one rank never enters holds all the others. The timeouts of gloo and NCCL end such a wait
without a name, and NCCL's without an exception. So a thread of every rank writes a mark into the store that the
ranks met at: the operation it is in, how many forward passes it has begun there, and a beat of its own.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

logger = logging.getLogger(__name__)

BEAT_S = 1.0
BEATS_PER_BOUND = 10  # at least: a short bound is kept to about a tenth


class StuckRankError(RuntimeError):
    """Other ranks wait for one that does not move; the message names it."""


class Mark(NamedTuple):
    """How far a rank has come."""

    operation: int = 0
    passes: int = 0
    beat: int = 0

    @property
    def position(self) -> tuple[int, int]:
        """Without the beat: what only the main thread moves."""
        return self.operation, self.passes


class RankWatch:
    """Ends this process where it waits in an operation for a rank that is stuck. All ranks make one.

    A rank is stuck if its process shows no sign of life for half of the bound (SIGSTOP), or if it is behind this
    one and has not moved for as long. Time outside an operation, as the wait for a batch, has no bound. Time is
    counted in beats of the thread, not by the clock, so that a job that was frozen as a whole blames nobody.

    Args:
        bound_s: seconds without progress of this rank, after which it looks for one to blame.
    """

    def __init__(self, bound_s: float) -> None:
        self._bound_s = bound_s
        self._beat_s = min(BEAT_S, bound_s / BEATS_PER_BOUND)
        self._rank = dist.get_rank()
        self._others = [rank for rank in range(dist.get_world_size()) if rank != self._rank]
        self._operation = self._passes = 0
        self._word = ""  # of the operation it is in
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="rank-watch", daemon=True)

    def __enter__(self) -> RankWatch:
        if self._others:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        if self._others:
            self._thread.join()  # a thread that still runs when the interpreter ends can abort the process

    @contextmanager
    def operation(self, word: str) -> Iterator[None]:
        """The main thread is in the next operation that all ranks do together; ``word`` is its name."""
        self._operation += 1
        self._passes = 0
        self._word = word
        try:
            yield
        finally:
            self._word = ""

    def begin_pass(self, *_: object) -> None:
        """The main thread begins a forward pass; takes anything, so that it can be a hook of a module."""
        self._passes += 1

    # ------------------------------------------------------------------ the thread

    def _watch(self) -> None:
        bound = math.ceil(self._bound_s / self._beat_s)
        last, still, earlier = Mark(), 0, dict[int, Mark]()
        try:
            # A connection of its own: the process group's store may be waiting for something.
            store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
            while not self._closed.wait(self._beat_s):
                mark = Mark(self._operation, self._passes, last.beat + 1)
                store.set(_key(self._rank), " ".join(map(str, mark)))
                still = still + 1 if self._word and mark.position == last.position else 0
                last = mark
                if still == bound // 2:
                    earlier = self._marks(store)
                elif still >= bound:
                    self._judge(mark, earlier, self._marks(store))
                    still = 0
        except RuntimeError as error:  # whoever kept the store has ended: the launcher deals with that
            logger.warning("rank %d no longer watches the others: %s", self._rank, error)

    def _marks(self, store: Store) -> dict[int, Mark]:
        """Of the other ranks; zeros for one that has posted none."""
        posted = [rank for rank in self._others if store.check([_key(rank)])]
        values = store.multi_get([_key(rank) for rank in posted]) if posted else []
        marks = {rank: Mark(*map(int, value.split())) for rank, value in zip(posted, values, strict=True)}
        return {rank: marks.get(rank, Mark()) for rank in self._others}

    def _judge(self, own: Mark, earlier: dict[int, Mark], marks: dict[int, Mark]) -> None:
        stuck = stuck_ranks(own, earlier, marks)
        waiting = f"in operation {own.operation} ({self._word}) for {self._bound_s:g} s"
        if not stuck:
            logger.warning("rank %d makes no progress %s; no other rank is behind it", self._rank, waiting)
            return
        who = f"rank {stuck[0]} is" if len(stuck) == 1 else f"ranks {', '.join(map(str, stuck))} are"
        error = StuckRankError(f"{who} stuck: rank {self._rank} waits {waiting} (learner.collective_timeout_s)")
        logger.error("%s", error)
        get_error_handler().record_exception(error)
        os._exit(1)  # the main thread is inside a collective, where no exception reaches it


def stuck_ranks(own: Mark, earlier: dict[int, Mark], marks: dict[int, Mark]) -> list[int]:
    """Ranks that gave no sign of life since ``earlier``, or have not moved since and are behind ``own``."""
    return [
        rank
        for rank, mark in marks.items()
        if mark == earlier[rank] or (mark.position == earlier[rank].position and mark.position < own.position)
    ]


def _key(rank: int) -> str:
    return f"deepretrieval/rank/{rank}"
