"""The client side of the broker's protocol, for actors, rewarders, the learner and monitors (asyncio).

Reconnection is the client's business: where the broker does not know it (any more) it says `Hello` again, declares
its credit again, and voids the work it held (its result would be late anyway).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from common import cache_messages as c
from common import messages as m
from common.transport.keys import RunKeys
from common.transport.line import BrokerLine
from common.transport.quota_slot import QuotaSlot, SlotWaiter
from common.transport.shared_results import SharedResults

logger = logging.getLogger(__name__)

MAX_FRAME_BYTES = 64 << 20  # where the config says nothing else
CLOCK_DRIFT = 2e-4  # by which two hosts' monotonic clocks may differ in speed; ten times what quartz does


class BrokerUnreachableError(ConnectionError):
    """No answer from the broker in time."""


@dataclass(frozen=True)
class Assignment:
    """One lease in this process's hands."""

    lease: m.LeaseRef
    payload: list[memoryview]


class BrokerClient:
    """One peer of the broker. Not thread-safe: everything runs in one event loop.

    `on_connect` is called after every `Welcome`: on first contact, after the broker restarted, and after it gave this
    peer up and met it again (what was sent between is lost). `on_superseded` is called where a newer learner has
    taken this one's place, `on_refused` with submitted tickets that must be submitted again later.

    What it holds is bounded by the credit it declared: a lease beyond that is not taken, and goes to others.

    max_frame_bytes: a larger frame ends the connection, which is then made anew.
    """

    def __init__(
        self,
        endpoint: str,
        keys: RunKeys,
        role: m.Role,
        name: str,
        incarnation: int = 0,
        on_connect: Callable[[], None] | None = None,
        on_superseded: Callable[[], None] | None = None,
        on_refused: Callable[[tuple[int, ...]], None] | None = None,
        max_frame_bytes: int = MAX_FRAME_BYTES,
    ) -> None:
        self.name = name
        self.state: m.RunState | None = None
        self.assignments: asyncio.Queue[Assignment] = asyncio.Queue()
        self._role: m.Role = role
        self._incarnation = incarnation
        self._on_connect = on_connect
        self._on_superseded = on_superseded
        self._on_refused = on_refused
        self._capacity: dict[m.StageName, int] = {}
        self._credit: dict[m.StageName, int] = {}  # the largest capacity that was ever declared
        self._held: dict[m.LeaseRef, None] = {}
        self._newest_seen: dict[m.StageName, int] = {}
        self.pause: Callable[[], str] = str  # what everything waits for at the moment; "" for nothing
        self._status = m.PeerStatus()
        self._progress_at = time.monotonic()
        self._broker_epoch: int | None = None
        self._heartbeat_s = 1.0
        self._said_hello_at = 0.0
        self._state_changed = asyncio.Condition()
        self._status_waiters: list[asyncio.Future[m.StatusReply]] = []
        self._slot_waiters: dict[int, SlotWaiter] = {}
        self._request_numbers = itertools.count(1)
        self._tasks: list[asyncio.Task[None]] = []
        self.shared = SharedResults(self._send)
        self._line = BrokerLine(endpoint, keys, name, max_frame_bytes, self._hello)

    # ------------------------------------------------------------------ life

    async def start(self, timeout_s: float = 30.0) -> None:
        """Connect and wait for the broker's welcome.

        Raises:
            BrokerUnreachableError: no welcome within `timeout_s` (no broker there, or the wrong keys).
        """
        self._line.open()
        self._hello()
        loops = (self._receive_loop(), self._heartbeat_loop())
        self._tasks = [asyncio.create_task(loop) for loop in loops]
        deadline = time.monotonic() + timeout_s
        while self._broker_epoch is None:
            if time.monotonic() > deadline:
                await self.close()
                raise BrokerUnreachableError(
                    f"no answer from the broker at {self._line.endpoint} within {timeout_s:.0f} s: "
                    "is it running, and is the keys folder the one of this run?"
                )
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        """Say goodbye (leases go to others at once) and stop."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._broker_epoch is not None:
            self._send(m.Bye())
        await self._line.close()

    # ------------------------------------------------------------------ work

    def serve(self, stage: m.StageName, capacity: int) -> None:
        """Declare credit: up to `capacity` leases of `stage` at a time."""
        self._capacity[stage] = capacity
        self._credit[stage] = max(capacity, self._credit.get(stage, 0))
        self._send(m.Serve(stage, capacity))

    def complete(self, assignment: Assignment, payload: m.Payload = ()) -> None:
        """Hand in the result of a lease."""
        if self._held.pop(assignment.lease, 0) is None:
            self._send(m.Complete(assignment.lease), payload)
        self.note_progress()

    def release(self, assignment: Assignment, delay_s: float, reason: str) -> None:
        """Give a lease back: the work cannot be done now."""
        if self._held.pop(assignment.lease, 0) is None:
            self._send(m.Release(assignment.lease, delay_s, reason[:1000]))

    def holds(self, assignment: Assignment) -> bool:
        """Whether the lease still counts (False once its broker is gone)."""
        return assignment.lease in self._held

    def submit(self, tickets: list[m.Ticket]) -> None:
        """Learner: offer tickets for generation; ones already known to the broker are ignored there."""
        for start in range(0, len(tickets), m.MAX_TICKETS):
            part = tickets[start : start + m.MAX_TICKETS]
            self._send(m.Submit(tuple(t.ticket_id for t in part)), [m.encode(t) for t in part])

    def announce(self, state: m.RunState) -> None:
        """Learner: publish the newest run state."""
        self.state = state
        self._send(m.Announce(state))

    # ------------------------------------------------------------------ state, status, quota

    async def wait_for_state(self, satisfied: Callable[[m.RunState], bool]) -> m.RunState:
        """Wait until the learner's announced state satisfies a condition."""
        async with self._state_changed:
            await self._state_changed.wait_for(lambda: self.state is not None and satisfied(self.state))
        assert self.state is not None
        return self.state

    def set_status(self, phase: str, waits_for: str = "", counters: dict[str, float] | None = None) -> None:
        """What the next heartbeat tells the fleet."""
        counters = self._status.counters if counters is None else counters
        self._status = m.PeerStatus(phase=phase, waits_for=waits_for, counters=counters)

    def note_progress(self) -> None:
        """Something was achieved: resets the age of progress that health is judged by."""
        self._progress_at = time.monotonic()

    async def fleet_status(self, timeout_s: float = 5.0) -> m.StatusReply:
        """Ask the broker how everybody is doing.

        Raises:
            BrokerUnreachableError: no answer in time.
        """
        waiter: asyncio.Future[m.StatusReply] = asyncio.get_running_loop().create_future()
        self._status_waiters.append(waiter)
        self._send(m.StatusRequest(), newest_of="status")
        try:
            async with asyncio.timeout(timeout_s):  # wait_for of Python 3.11 can swallow a cancellation
                return await waiter
        except TimeoutError:
            raise BrokerUnreachableError(f"the broker at {self._line.endpoint} does not answer") from None
        finally:
            if waiter in self._status_waiters:
                self._status_waiters.remove(waiter)

    @contextlib.asynccontextmanager
    async def quota_slot(self) -> AsyncIterator[QuotaSlot]:
        """Hold one slot of the fleet's quota around one upstream request (see `common.quota`).

        Call `replied()` when the answer arrives. A request that ends without one may still be on its way, so
        its slot is left to the broker's hard deadline.
        """
        while True:
            slot = await self._acquire_slot()
            if slot is not None:
                break
        yield slot

    async def _acquire_slot(self) -> QuotaSlot | None:
        """Wait for a grant; None where it came too late to be used safely: it is given back and another one is due.

        A grant may be read long after it was given (this process was stopped, the network hung), and the broker's
        clock is not ours. But it was given `waited_s` after the request reached the broker, which was no earlier than
        when we asked: so its age is at most what has passed since then, less `waited_s`.
        """
        waiter = SlotWaiter(0, 0.0, asyncio.get_running_loop().create_future())
        self._ask_for_slot(waiter)
        try:
            grant = await waiter.granted
        except BaseException:
            if waiter.granted.done() and not waiter.granted.cancelled():  # granted at the moment it was given up
                QuotaSlot(waiter.granted.result(), self._send).unused()
            raise
        finally:
            self._slot_waiters.pop(waiter.number, None)
        age_s = (time.monotonic() - waiter.asked_at) * (1 + CLOCK_DRIFT) - grant.waited_s
        slot = QuotaSlot(grant, self._send, max(0.0, age_s))
        if age_s < grant.use_within_s:
            return slot
        slot.unused()
        return None

    def _ask_for_slot(self, waiter: SlotWaiter) -> None:
        """A number is used once: a late answer to an earlier request must not pass for one to a later."""
        self._slot_waiters.pop(waiter.number, None)
        waiter.number, waiter.asked_at = next(self._request_numbers), time.monotonic()
        self._slot_waiters[waiter.number] = waiter
        self._send(m.SlotRequest(waiter.number))

    # ------------------------------------------------------------------ internals

    def _send(self, message: m.AnyToBroker, payload: m.Payload = (), newest_of: str = "") -> None:
        self._line.send([m.encode(message), *payload], newest_of)

    def _hello(self) -> None:
        self._said_hello_at = time.monotonic()
        if self._line.waits("hello"):
            return  # it will be said on this connection
        self._send(m.Hello(self._role, self._incarnation), newest_of="hello")
        for stage, capacity in self._capacity.items():
            self._send(m.Serve(stage, capacity))

    async def _heartbeat_loop(self) -> None:
        while True:
            await asyncio.sleep(self._heartbeat_s)
            if self._broker_epoch is None:
                continue
            self.shared.beat()
            age = max(0.0, time.monotonic() - self._progress_at)
            waits_for = self.pause() or self._status.waits_for
            status = m.PeerStatus(self._status.phase, waits_for, age, self._status.counters)
            self._send(m.Heartbeat(tuple(self._held), dict(self._newest_seen), status), newest_of="heartbeat")

    async def _receive_loop(self) -> None:
        while True:
            frames = await self._line.receive()
            try:
                message = m.decode(frames[0], m.AnyFromBroker)
            except m.MessageError as error:
                logger.warning("dropped a message from the broker: %s", error)
                continue
            await self._handle(message, frames[1:])

    async def _handle(self, message: m.AnyFromBroker, payload: list[memoryview]) -> None:
        match message:
            case m.Assign(lease):
                self._assigned(Assignment(lease, payload))
            case m.Welcome():
                await self._welcomed(message)
            case m.StateUpdate(state):
                await self._set_state(state)
            case m.Who():
                if time.monotonic() - self._said_hello_at > self._heartbeat_s:
                    self._hello()
            case m.SlotGrant(request):
                waiter = self._slot_waiters.get(request)
                if waiter is None or waiter.granted.done():
                    QuotaSlot(message, self._send).unused()
                else:
                    waiter.granted.set_result(message)
            case m.StatusReply():
                for waiting in self._status_waiters:
                    if not waiting.done():
                        waiting.set_result(message)
            case c.CacheValue() | c.CacheFetch() | c.CacheWait():
                self.shared.handle(message, payload)
            case m.Refused(tickets):
                if self._on_refused is not None:
                    self._on_refused(tickets)
            case m.Superseded(incarnation) if incarnation > self._incarnation:
                logger.error("a newer learner (incarnation %d) leads this run", incarnation)
                if self._on_superseded is not None:
                    self._on_superseded()
            case m.Protest(reason):
                logger.error("the broker refused a message of %s: %s", self.name, reason)

    def _assigned(self, assignment: Assignment) -> None:
        lease = assignment.lease
        self._newest_seen[lease.stage] = max(lease.lease, self._newest_seen.get(lease.stage, 0))
        if len(self._held) >= sum(self._credit.values()):
            logger.warning("%s did not take a lease beyond its credit", self.name)
            return  # the next heartbeat does not name it, and the broker gives it to another
        self._held[lease] = None
        self.assignments.put_nowait(assignment)

    def _void(self) -> None:
        """What is held does not count any more."""
        self._held.clear()
        while not self.assignments.empty():
            self.assignments.get_nowait()

    async def _welcomed(self, welcome: m.Welcome) -> None:
        """A Hello was answered: whatever this peer held or had asked for before it is void at the broker."""
        self._heartbeat_s = welcome.heartbeat_s
        self._broker_epoch = welcome.broker_epoch
        self._void()
        self._newest_seen.clear()
        for waiter in list(self._slot_waiters.values()):
            if not waiter.granted.done():
                self._ask_for_slot(waiter)
        if welcome.state is not None and self._role != "learner":
            await self._set_state(welcome.state)
        self.shared.welcomed()
        if self._on_connect is not None:
            self._on_connect()

    async def _set_state(self, state: m.RunState) -> None:
        if self._role == "learner":
            return  # the learner is where the state comes from
        if self.state is not None and state.incarnation != self.state.incarnation:
            self._void()  # the broker has cleared its queues for the new learner
        async with self._state_changed:
            self.state = state
            self._state_changed.notify_all()
