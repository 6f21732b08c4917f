"""The fleet's quota as a pure state machine: at most N arrivals upstream in ANY window of W seconds.

Rules that bound *sends* do not bound *arrivals*: latency bunches requests up again. So each of N slots is held
from before the request is sent until W seconds after its answer came back. A request sent at s arrives at
a ≥ s and is answered at r ≥ a; the slot is free again at r + W or later, so two arrivals through one slot are
at least W apart, and N slots give at most N arrivals in any window. The price: a slot serves one request in
W + RTT seconds, so N / (W + RTT) requests per second are granted at best (`common.adaptive_quota` pays less, for a
weaker promise).

Where no answer is heard of (a worker killed, a lost message), the slot frees itself `hard_deadline_s + W` after
its grant: by then the request was answered or given up by its own deadline. A broker that starts does not know
what an earlier one granted, so it stays closed that long first.

What the proof asks of the worker: that it sends no later than its share of `hard_deadline_s` after the grant. It cannot
know the broker's clock, so a grant says how long its request waited at the broker, and the worker counts from when it
asked (see `BrokerClient.quota_slot`). And that its kernel does not deliver later what it was given in time: its sockets
discard what is unsent when they are closed, and give up what is not acknowledged within the request's deadline
(`rewarders.engines.connections`).

Two holes are left. One every scheme with a client has: a process stopped after it looked at its clock and before the
kernel took its bytes, for longer than the slack in `hard_deadline_s`. The other lies behind the host: a proxy or a
network that holds packets back for longer than that delivers them late. (Where there is no TCP_USER_TIMEOUT, on other
systems than Linux, a third: a process that is stopped while the network is cut.)

Invariants: a slot is free, granted to one request, or cooling; `granted - freed ≤ N`; nothing is granted while the pool
is closed; requests of one worker are served in order, workers share fairly by order of request, but a worker that was
not heard of since a grant `SILENT_AFTER_S` ago comes after those that were: a stopped process sinks one slot, not many.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from dataclasses import dataclass

from common.messages import MAX_RETRY_AFTER_S

USE_GRANT_WITHIN_S = 0.5  # a granted slot that its worker did not use by then must not be used any more


@dataclass(frozen=True, slots=True)
class SlotGranted:
    """Slot `slot` belongs to request `request` of `worker` under the number `grant`; it waited `waited_s` seconds."""

    worker: str
    request: int
    slot: int
    grant: int
    waited_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Reply:
    """What a worker tells of an answer.

    limit, remaining: the service's X-RateLimit headers, None where it sends none. sent_after_s: seconds from the grant
    until the request left, took_s: from then to the first bytes of the answer; None where the worker did not say.
    unused: no request was sent at all, and none will be.
    """

    limit: int | None = None
    remaining: int | None = None
    sent_after_s: float | None = None
    took_s: float | None = None
    unused: bool = False


NO_NEWS = Reply()


class SlotPool:
    """N completion-anchored slots. Times are seconds on one monotonic clock: the caller's.

    first_grant: grants are numbered from here, so that those of two brokers do not meet.
    """

    def __init__(
        self,
        slots: int,
        window_s: float,
        hard_deadline_s: float,
        now: float,
        quarantine: bool = True,
        first_grant: int = 1,
    ) -> None:
        opens = now + hard_deadline_s + window_s if quarantine else now
        self.granted = 0
        self.refused = 0  # requests the service turned away for the quota
        self._window_s = window_s
        self._hold_s = hard_deadline_s + window_s
        self._first_grant = first_grant
        self._grant_of = [0] * slots  # the newest grant of each slot; 0: none yet
        self._worker_of = [""] * slots  # whom it went to
        self._granted_at = [float("-inf")] * slots
        self._free_at = [opens] * slots
        self._out: set[int] = set()  # slots whose request is out
        self._heap = [(opens, slot) for slot in range(slots)]  # may hold outdated entries
        self._waiting: deque[tuple[str, int, float]] = deque()  # worker, request, since
        self._waiting_of: Counter[str] = Counter()
        self._unheard: dict[str, float] = {}  # workers not heard of since a grant: when the first of these was
        self._closed_until = float("-inf")

    @property
    def in_use(self) -> int:
        """Slots whose request is out."""
        return len(self._out)

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._waiting)

    def phase(self, now: float) -> str:
        """What the slots are anchored to at the moment, for people."""
        return "strict"

    def waiting_of(self, worker: str) -> int:
        """Requests of one worker that wait for a slot."""
        return self._waiting_of[worker]

    def worker_of(self, slot: int) -> str | None:
        """Whom the newest grant of a slot went to; None if there is no such slot or grant."""
        return (self._worker_of[slot] or None) if 0 <= slot < len(self._worker_of) else None

    def closed_for(self, now: float) -> float:
        """Seconds for which nothing is granted; 0 where the pool is open."""
        return max(0.0, self._closed_until - now)

    # ------------------------------------------------------------------ events

    def request(self, worker: str, request: int, now: float) -> None:
        """A worker wants to send one request upstream."""
        self._waiting.append((worker, request, now))
        self._waiting_of[worker] += 1

    def replied(self, slot: int, grant: int, now: float, reply: Reply = NO_NEWS) -> bool:
        """The answer to a granted request came in, or its deadline passed. False if the slot has moved on."""
        if not 0 <= slot < len(self._grant_of) or self._grant_of[slot] != grant or slot not in self._out:
            return False
        self._out.remove(slot)
        self._schedule(slot, now if reply.unused else self._free_after(slot, now, reply))
        return True

    def throttled(self, for_s: float, now: float, refused: bool = True) -> None:
        """The service asks to be left alone for `for_s` seconds (at most `MAX_RETRY_AFTER_S` count), by everybody.

        refused: it turned a request away for the quota; False where it is merely busy.
        """
        self.refused += refused
        self.close(now + min(for_s, MAX_RETRY_AFTER_S))

    def close(self, until: float) -> None:
        """Grant nothing before `until`; an earlier closure that lasts longer stays."""
        self._closed_until = max(self._closed_until, until)

    def heard(self, worker: str) -> None:
        """A message of this worker has come: it is not stopped."""
        self._unheard.pop(worker, None)

    def leave(self, worker: str) -> None:
        """A worker is gone: forget what it waits for. Slots it was granted stay held: the request may be out."""
        self._unheard.pop(worker, None)
        if self._waiting_of.pop(worker, 0):
            self._waiting = deque(entry for entry in self._waiting if entry[0] != worker)

    def grant(self, now: float) -> list[SlotGranted]:
        """Give free slots to waiting requests, in order."""
        grants: list[SlotGranted] = []
        while now >= self._closed_until and self._waiting and self._heap and self._heap[0][0] <= now:
            free_at, slot = heapq.heappop(self._heap)
            if free_at == self._free_at[slot]:
                grants.append(self._give_next(slot, now))
        return grants

    def next_event(self) -> float | None:
        """When a slot may free itself, if somebody waits."""
        return max(self._heap[0][0], self._closed_until) if self._waiting and self._heap else None

    # ------------------------------------------------------------------ inside

    def _free_after(self, slot: int, now: float, reply: Reply) -> float:
        """When a slot whose request is answered may be used again."""
        return now + self._window_s

    def _hold(self, now: float) -> float:
        """Seconds after its grant at which a slot of which nothing is heard frees itself."""
        return self._hold_s

    def _give_next(self, slot: int, now: float) -> SlotGranted:
        worker, request, since = self._take_waiting(now)
        self._waiting_of[worker] -= 1
        if not self._waiting_of[worker]:
            del self._waiting_of[worker]
        grant = self._first_grant + self.granted
        self.granted += 1
        self._grant_of[slot] = grant
        self._worker_of[slot] = worker
        self._granted_at[slot] = now
        self._out.add(slot)
        self._unheard.setdefault(worker, now)
        self._schedule(slot, now + self._hold(now))
        return SlotGranted(worker, request, slot, grant, now - since)

    def _take_waiting(self, now: float) -> tuple[str, int, float]:
        """The request whose turn it is: the oldest of a worker that is not silent, else the oldest."""
        silent = {worker for worker, since in self._unheard.items() if now - since > USE_GRANT_WITHIN_S}
        if silent:
            for place, entry in enumerate(self._waiting):
                if entry[0] not in silent:
                    del self._waiting[place]
                    return entry
        return self._waiting.popleft()

    def _schedule(self, slot: int, free_at: float) -> None:
        self._free_at[slot] = free_at
        heapq.heappush(self._heap, (free_at, slot))
