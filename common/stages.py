"""A stage: a bounded queue whose items are leased to workers, as a pure state machine.

It holds no socket, task or clock: events and the time come in as arguments, decisions come out as values.

Invariants, after every call:

1. An item offered and not yet completed is in exactly one place: queued, delayed, or leased to one worker.
2. A lease number is given out once. Only the newest lease of an item can complete or release it, and only the
   worker that holds it; any other answer is *late* and changes nothing. So an item is completed at most once.
3. A worker is never given more leases than the capacity (credit) it declared; declaring less takes none away.
4. An item comes back to the queue when its lease expires, its worker leaves or says that it lost it, or it is
   released; work that was given out before goes before work that never was.
5. An `offer` beyond the bounds in items or bytes answers FULL (backpressure). `bytes` is the sum over the items
   held; it is below the bound before an item is taken in, so above it by less than one item.
6. A lease expires `lease_s` after it was given or last renewed, no sooner.
7. `clear` forgets every item and lease and no worker; answers to what was cleared are late.

Times are seconds on any clock that never goes back. Cost: O(log n) per event; nothing walks the queue.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
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
    """One piece of work; lower `priority` tuples go first, equal ones in order of arrival. begun: was given out."""

    item_id: int
    priority: tuple[int, ...]
    payload: P
    size: int
    lease: int | None = None
    worker: str | None = None
    begun: bool = False


@dataclass(slots=True)
class _Worker(Generic[P]):
    capacity: int
    leases: dict[int, Item[P]] = field(default_factory=dict)


@dataclass(slots=True)
class Grant(Generic[P]):
    """`item_id` goes to `worker` under the number `lease`."""

    worker: str
    item_id: int
    lease: int
    payload: P


class Stage(Generic[P]):
    """One queue with leases; payloads are opaque.

    Args:
        lease_s: seconds until a lease expires.
        max_items, max_bytes: what is held at most before offers are refused.
        first_lease: the number of the first lease, at least 1; they count up from it.
    """

    def __init__(self, name: str, lease_s: float, max_items: int, max_bytes: int, first_lease: int = 1) -> None:
        self.name = name
        self.bytes = 0
        self.expired = 0
        self.late = 0
        self._lease_s = lease_s
        self._max_items = max_items
        self._max_bytes = max_bytes
        self._recent_size = 0.0  # moving average over the items offered
        self._items: dict[int, Item[P]] = {}
        self._queue: list[tuple[bool, tuple[int, ...], int, Item[P]]] = []  # new, priority, arrival, item
        self._delayed: list[tuple[float, int, Item[P]]] = []  # ready at, arrival, item
        self._leases: OrderedDict[int, tuple[float, Item[P]]] = OrderedDict()  # lease -> expires at; earliest first
        self._workers: dict[str, _Worker] = {}
        self._ready: OrderedDict[str, None] = OrderedDict()  # workers with free capacity, in round-robin order
        self._lease_numbers = itertools.count(first_lease)
        self._arrivals = itertools.count()

    # ------------------------------------------------------------------ sizes

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, item_id: int) -> bool:
        return item_id in self._items

    @property
    def leased(self) -> int:
        """Items in workers' hands."""
        return len(self._leases)

    @property
    def queued(self) -> int:
        """Items waiting for a worker, delayed ones included."""
        return len(self._items) - len(self._leases)

    @property
    def room(self) -> int:
        """Items that can still be offered before the stage is full, if they are as large as the recent ones."""
        if self.bytes >= self._max_bytes:
            return 0
        items = max(0, self._max_items - len(self._items))
        if not self._recent_size:
            return items
        return min(items, max(1, int((self._max_bytes - self.bytes) / self._recent_size)))

    def room_for_results(self, promised: int) -> int:
        """How many more results may be promised room here, with `promised` on their way.

        An eighth of the bytes is left free for results that are larger than the recent ones.
        """
        items = self._max_items - len(self._items) - promised
        spare_bytes = self._max_bytes - self._max_bytes // 8 - self.bytes
        if spare_bytes <= 0:
            return 0
        if self._recent_size:
            items = min(items, max(1, int(spare_bytes / self._recent_size)) - promised)
        return max(0, items)

    def leases_of(self, worker: str) -> int:
        """How many leases a worker holds."""
        known = self._workers.get(worker)
        return len(known.leases) if known else 0

    def payload_of(self, item_id: int) -> P | None:
        """What was offered under this id, None if the stage does not hold it."""
        item = self._items.get(item_id)
        return None if item is None else item.payload

    # ------------------------------------------------------------------ producers

    def offer(self, item_id: int, payload: P, size: int, priority: tuple[int, ...] = (0,)) -> Offer:
        """Queue an item of `size` bytes."""
        if item_id in self._items:
            return Offer.DUPLICATE
        if not self.room:
            return Offer.FULL
        item = self._items[item_id] = Item(item_id, priority, payload, size)
        self.bytes += size
        self._recent_size += (size - self._recent_size) / 16 if self._recent_size else size
        self._enqueue(item)
        return Offer.ACCEPTED

    def clear(self) -> None:
        """Forget every item and lease; workers and their capacity stay."""
        self._items.clear()
        self._queue.clear()
        self._delayed.clear()
        self._leases.clear()
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
        return [self._take_back(item) for item in list(known.leases.values())]

    def renew(self, worker: str, held: Iterable[int], newest_seen: int, now: float) -> list[int]:
        """Extend the leases a worker says it holds; take back those it has seen and no longer holds.

        Leases above `newest_seen` are still on their way to the worker. Returns the ids taken back. Numbers
        that are not the worker's are ignored: their results will be late.
        """
        known = self._workers.get(worker)
        if known is None:
            return []
        said = set(held)
        for lease in said & known.leases.keys():
            self._leases[lease] = (now + self._lease_s, known.leases[lease])
            self._leases.move_to_end(lease)
        lost = [item for lease, item in known.leases.items() if lease not in said and lease <= newest_seen]
        return [self._take_back(item) for item in lost]

    # ------------------------------------------------------------------ leases

    def grant(self, now: float, limit: int | None = None) -> list[Grant[P]]:
        """Lease queued items to workers with free capacity, in priority order, workers in turn."""
        self._wake_delayed(now)
        grants: list[Grant[P]] = []
        while self._ready and self._queue and (limit is None or len(grants) < limit):
            grants.append(self._lease(heapq.heappop(self._queue)[-1], now))
        return grants

    def complete(self, item_id: int, lease: int, worker: str) -> Item[P] | None:
        """The work is done: forgets the item and returns it, or None where the answer is late."""
        item = self._held_by(worker, item_id, lease)
        if item is None:
            return None
        self._unlease(item)
        del self._items[item_id]
        self.bytes -= item.size
        return item

    def release(self, item_id: int, lease: int, worker: str, ready_at: float) -> bool:
        """The work could not be done: queue it again at `ready_at`. False where the answer is late."""
        item = self._held_by(worker, item_id, lease)
        if item is None:
            return False
        self._unlease(item)
        heapq.heappush(self._delayed, (ready_at, next(self._arrivals), item))
        return True

    def expire(self, now: float) -> list[int]:
        """Queue again the items whose lease has run out. Returns their ids."""
        returned = []
        while self._leases:
            expires_at, item = next(iter(self._leases.values()))
            if expires_at > now:
                break
            returned.append(self._take_back(item))
        self.expired += len(returned)
        return returned

    def next_event(self) -> float | None:
        """The earliest time at which `expire` or `grant` may have something to do by themselves."""
        expires_at = next(iter(self._leases.values()))[0] if self._leases else None
        if not self._delayed:
            return expires_at
        ready_at = self._delayed[0][0]
        return ready_at if expires_at is None else min(ready_at, expires_at)

    # ------------------------------------------------------------------ internals

    def _held_by(self, worker: str, item_id: int, lease: int) -> Item[P] | None:
        item = self._items.get(item_id)
        if item is None or item.lease != lease or item.worker != worker:
            self.late += 1
            return None
        return item

    def _enqueue(self, item: Item[P]) -> None:
        heapq.heappush(self._queue, (not item.begun, item.priority, next(self._arrivals), item))

    def _wake_delayed(self, now: float) -> None:
        while self._delayed and self._delayed[0][0] <= now:
            self._enqueue(heapq.heappop(self._delayed)[2])

    def _lease(self, item: Item[P], now: float) -> Grant[P]:
        name, _ = self._ready.popitem(last=False)
        worker = self._workers[name]
        item.lease, item.worker, item.begun = next(self._lease_numbers), name, True
        worker.leases[item.lease] = item
        self._leases[item.lease] = (now + self._lease_s, item)
        self._note_capacity(name, worker)
        return Grant(name, item.item_id, item.lease, item.payload)

    def _take_back(self, item: Item[P]) -> int:
        self._unlease(item)
        self._enqueue(item)
        return item.item_id

    def _unlease(self, item: Item[P]) -> None:
        assert item.lease is not None
        assert item.worker is not None
        del self._leases[item.lease]
        worker = self._workers.get(item.worker)
        if worker is not None:
            del worker.leases[item.lease]
            self._note_capacity(item.worker, worker)
        item.lease = item.worker = None

    def _note_capacity(self, name: str, worker: _Worker[P]) -> None:
        if len(worker.leases) < worker.capacity:
            self._ready.setdefault(name)
        else:
            self._ready.pop(name, None)
