"""The fleet's quota as a pure state machine: at most N arrivals upstream in ANY window of W seconds.

Rules that bound *sends* do not bound *arrivals*: latency bunches requests up again. So each of N slots is held
from before the request is sent until W seconds after its answer came back. A request sent at s arrives at
a ≥ s and is answered at r ≥ a; the slot is free again at r + W or later, so two arrivals through one slot are
at least W apart, and N slots give at most N arrivals in any window.

Where no answer is heard of (a worker killed, a lost message), the slot frees itself `hard_deadline_s + W` after
its grant: by then the request was answered or given up by its own deadline. A broker that starts does not know
what an earlier one granted, so it stays closed that long first.

Invariants: a slot is free, granted to one request, or cooling; `granted - freed ≤ N`; requests of one worker
are served in order, workers share fairly by order of request.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SlotGranted:
    """Slot `slot` belongs to request `request` of `worker` under the number `grant`."""

    worker: str
    request: int
    slot: int
    grant: int


class SlotPool:
    """N completion-anchored slots. Times are seconds on one monotonic clock: the caller's."""

    def __init__(
        self, slots: int, window_s: float, hard_deadline_s: float, now: float, quarantine: bool = True
    ) -> None:
        opens = now + hard_deadline_s + window_s if quarantine else now
        self.granted = 0
        self._window_s = window_s
        self._hold_s = hard_deadline_s + window_s
        self._grant_of = [0] * slots  # the newest grant of each slot; 0: none yet
        self._worker_of = [""] * slots  # whom it went to
        self._free_at = [opens] * slots
        self._out: set[int] = set()  # slots whose request is out
        self._heap = [(opens, slot) for slot in range(slots)]  # may hold outdated entries
        self._waiting: deque[tuple[str, int]] = deque()
        self._waiting_of: Counter[str] = Counter()

    @property
    def in_use(self) -> int:
        """Slots whose request is out."""
        return len(self._out)

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._waiting)

    def waiting_of(self, worker: str) -> int:
        """Requests of one worker that wait for a slot."""
        return self._waiting_of[worker]

    def worker_of(self, slot: int) -> str | None:
        """Whom the newest grant of a slot went to; None if there is no such slot or grant."""
        return (self._worker_of[slot] or None) if 0 <= slot < len(self._worker_of) else None

    def request(self, worker: str, request: int) -> None:
        """A worker wants to send one request upstream."""
        self._waiting.append((worker, request))
        self._waiting_of[worker] += 1

    def replied(self, slot: int, grant: int, now: float) -> bool:
        """The answer to a granted request came in, or its deadline passed. False if the slot has moved on."""
        if not 0 <= slot < len(self._grant_of) or self._grant_of[slot] != grant or slot not in self._out:
            return False
        self._out.remove(slot)
        self._schedule(slot, now + self._window_s)
        return True

    def leave(self, worker: str) -> None:
        """A worker is gone: forget what it waits for. Slots it was granted stay held: the request may be out."""
        if self._waiting_of.pop(worker, 0):
            self._waiting = deque(entry for entry in self._waiting if entry[0] != worker)

    def grant(self, now: float) -> list[SlotGranted]:
        """Give free slots to waiting requests, in order."""
        grants = []
        while self._waiting and self._heap and self._heap[0][0] <= now:
            free_at, slot = heapq.heappop(self._heap)
            if free_at == self._free_at[slot]:
                grants.append(self._give_next(slot, now))
        return grants

    def next_event(self) -> float | None:
        """When a slot may free itself, if somebody waits."""
        return self._heap[0][0] if self._waiting and self._heap else None

    def _give_next(self, slot: int, now: float) -> SlotGranted:
        worker, request = self._waiting.popleft()
        self._waiting_of[worker] -= 1
        if not self._waiting_of[worker]:
            del self._waiting_of[worker]
        self.granted += 1
        self._grant_of[slot] = self.granted
        self._worker_of[slot] = worker
        self._out.add(slot)
        self._schedule(slot, now + self._hold_s)
        return SlotGranted(worker, request, slot, self.granted)

    def _schedule(self, slot: int, free_at: float) -> None:
        self._free_at[slot] = free_at
        heapq.heappush(self._heap, (free_at, slot))
