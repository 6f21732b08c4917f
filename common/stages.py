"""A stage: a bounded queue whose items are leased to workers, as a pure state machine.

It holds no socket, task or clock: events and the time come in as arguments, decisions come out as values.

Invariants, after every call:

1. An item offered and not yet completed is in exactly one place: queued, delayed, or leased to one worker.
2. A lease number is given out once. Only the newest lease of an item can complete or release it; an answer
   under any other lease is *late* and changes nothing. So an item is completed at most once.
3. A worker never holds more leases than the capacity (credit) it declared.
4. An item comes back to the queue when its lease expires, its worker leaves, or it is released; it keeps its
   priority, so redelivered work goes first.
5. An `offer` beyond the bounds in items or bytes answers FULL (backpressure), unless it is forced.

Cost: O(log n) per event; nothing walks the queue.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Generic, TypeVar

P = TypeVar("P")


class Offer(Enum):
    """What became of an offered item."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"
    FULL = "full"


@dataclass(slots=True)
class Item(Generic[P]):
    """One piece of work; lower `priority` tuples go first, equal ones in order of arrival."""

    item_id: int
    priority: tuple[int, ...]
    payload: P
    size: int
    lease: int | None = None
    worker: str | None = None


@dataclass(slots=True)
class _Worker:
    capacity: int
    leases: dict[int, int] = field(default_factory=dict)  # lease -> item id


@dataclass(frozen=True, slots=True)
class Grant(Generic[P]):
    """`item_id` goes to `worker` under the number `lease`."""

    worker: str
    item_id: int
    lease: int
    payload: P


class Stage(Generic[P]):
    """One queue with leases. Payloads are opaque; times are seconds on any monotonic clock."""

    def __init__(self, name: str, lease_s: float, max_items: int, max_bytes: int) -> None:
        self.name = name
        self.bytes = 0
        self.expired = 0
        self.late = 0
        self._lease_s = lease_s
        self._max_items = max_items
        self._max_bytes = max_bytes
        self._items: dict[int, Item[P]] = {}
        self._queue: list[tuple[tuple[int, ...], int, int]] = []  # priority, arrival, item id
        self._delayed: list[tuple[float, int]] = []  # ready at, item id
        self._expiry: list[tuple[float, int, int]] = []  # expires at, lease, item id
        self._deadline: dict[int, float] = {}  # lease -> expires at; the heap may say earlier
        self._workers: dict[str, _Worker] = {}
        self._ready: dict[str, None] = {}  # workers with free capacity, in round-robin order
        self._lease_numbers = itertools.count(1)
        self._arrivals = itertools.count()

    # ------------------------------------------------------------------ sizes

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, item_id: int) -> bool:
        return item_id in self._items

    @property
    def leased(self) -> int:
        """Items in workers' hands."""
        return len(self._deadline)

    @property
    def queued(self) -> int:
        """Items waiting for a worker, delayed ones included."""
        return len(self._items) - self.leased

    @property
    def room(self) -> int:
        """Items that can still be offered before the stage is full."""
        return max(0, self._max_items - len(self._items)) if self.bytes < self._max_bytes else 0

    def leases_of(self, worker: str) -> int:
        """How many leases a worker holds."""
        known = self._workers.get(worker)
        return len(known.leases) if known else 0

    # ------------------------------------------------------------------ producers

    def offer(
        self, item_id: int, payload: P, size: int, priority: tuple[int, ...] = (0,), force: bool = False
    ) -> Offer:
        """Queue an item of `size` bytes. `force` is for results of work that was granted while there was room."""
        if item_id in self._items:
            return Offer.DUPLICATE
        if not self.room and not force:
            return Offer.FULL
        self._items[item_id] = Item(item_id, priority, payload, size)
        self.bytes += size
        self._enqueue(self._items[item_id])
        return Offer.ACCEPTED

    def clear(self) -> None:
        """Forget every item and lease; workers and their capacity stay."""
        for items in (self._items, self._queue, self._delayed, self._expiry, self._deadline):
            items.clear()
        self.bytes = 0
        for name, worker in self._workers.items():
            worker.leases.clear()
            self._note_capacity(name, worker)

    # ------------------------------------------------------------------ workers

    def serve(self, worker: str, capacity: int) -> None:
        """A worker declares how many leases it holds at most; 0 drains it without taking work away."""
        known = self._workers.setdefault(worker, _Worker(0))
        known.capacity = capacity
        self._note_capacity(worker, known)

    def leave(self, worker: str) -> list[int]:
        """A worker is gone: its items are queued again. Returns their ids."""
        known = self._workers.pop(worker, None)
        self._ready.pop(worker, None)
        if known is None:
            return []
        returned = list(known.leases.values())
        for item_id in returned:
            self._unlease(self._items[item_id])
            self._enqueue(self._items[item_id])
        return returned

    def renew(self, worker: str, held: Iterable[int], newest_seen: int, now: float) -> list[int]:
        """Extend the leases a worker says it holds; take back those it has seen and no longer holds.

        Leases above `newest_seen` are still on their way to the worker. Returns the ids taken back. Numbers
        that are no longer the worker's are ignored: their results will be late.
        """
        known = self._workers.get(worker)
        if known is None:
            return []
        said = set(held)
        for lease in said & known.leases.keys():
            self._deadline[lease] = now + self._lease_s
        lost = [item for lease, item in known.leases.items() if lease not in said and lease <= newest_seen]
        for item_id in lost:
            self._unlease(self._items[item_id])
            self._enqueue(self._items[item_id])
        return lost

    # ------------------------------------------------------------------ leases

    def grant(self, now: float, limit: int | None = None) -> list[Grant[P]]:
        """Lease queued items to workers with free capacity, in priority order, workers in turn."""
        self._wake_delayed(now)
        grants: list[Grant[P]] = []
        while self._ready and self._queue and (limit is None or len(grants) < limit):
            item = self._items.get(heapq.heappop(self._queue)[2])
            if item is None or item.lease is not None:
                continue  # an outdated entry: the item was completed or leased meanwhile
            grants.append(self._lease(item, now))
        return grants

    def complete(self, item_id: int, lease: int) -> Item[P] | None:
        """The work is done: forgets the item and returns it, or None where the answer is late."""
        item = self._current(item_id, lease)
        if item is None:
            return None
        self._unlease(item)
        del self._items[item_id]
        self.bytes -= item.size
        return item

    def release(self, item_id: int, lease: int, ready_at: float) -> bool:
        """The work could not be done: queue it again at `ready_at`. False where the answer is late."""
        item = self._current(item_id, lease)
        if item is None:
            return False
        self._unlease(item)
        heapq.heappush(self._delayed, (ready_at, item_id))
        return True

    def expire(self, now: float) -> list[int]:
        """Queue again the items whose lease has run out. Returns their ids."""
        returned = []
        while self._expiry and self._expiry[0][0] <= now:
            _, lease, item_id = heapq.heappop(self._expiry)
            item = self._items.get(item_id)
            if item is None or item.lease != lease:
                continue
            if self._deadline[lease] > now:  # renewed since the entry was made
                heapq.heappush(self._expiry, (self._deadline[lease], lease, item_id))
                continue
            self._unlease(item)
            self._enqueue(item)
            returned.append(item_id)
        self.expired += len(returned)
        return returned

    def next_event(self) -> float | None:
        """The earliest time at which `expire` or `grant` may have something to do by themselves."""
        times = [heap[0][0] for heap in (self._delayed, self._expiry) if heap]
        return min(times, default=None)

    # ------------------------------------------------------------------ internals

    def _current(self, item_id: int, lease: int) -> Item[P] | None:
        item = self._items.get(item_id)
        if item is None or item.lease != lease:
            self.late += 1
            return None
        return item

    def _enqueue(self, item: Item[P]) -> None:
        heapq.heappush(self._queue, (item.priority, next(self._arrivals), item.item_id))

    def _wake_delayed(self, now: float) -> None:
        while self._delayed and self._delayed[0][0] <= now:
            item = self._items.get(heapq.heappop(self._delayed)[1])
            if item is not None and item.lease is None:
                self._enqueue(item)

    def _lease(self, item: Item[P], now: float) -> Grant[P]:
        name = next(iter(self._ready))
        del self._ready[name]
        worker = self._workers[name]
        item.lease, item.worker = next(self._lease_numbers), name
        worker.leases[item.lease] = item.item_id
        self._deadline[item.lease] = now + self._lease_s
        heapq.heappush(self._expiry, (now + self._lease_s, item.lease, item.item_id))
        self._note_capacity(name, worker)
        return Grant(name, item.item_id, item.lease, item.payload)

    def _unlease(self, item: Item[P]) -> None:
        assert item.lease is not None
        assert item.worker is not None
        del self._deadline[item.lease]
        worker = self._workers.get(item.worker)
        if worker is not None:
            worker.leases.pop(item.lease, None)
            self._note_capacity(item.worker, worker)
        item.lease = item.worker = None

    def _note_capacity(self, name: str, worker: _Worker) -> None:
        if len(worker.leases) < worker.capacity:
            self._ready.setdefault(name)
        else:
            self._ready.pop(name, None)
