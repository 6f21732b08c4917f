"""The learner's line to the broker: a `BrokerClient` in a thread of its own, so that training never waits for it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from common import messages as m
from common.transport.client import MAX_FRAME_BYTES, Assignment, BrokerClient, BrokerUnreachableError
from common.transport.keys import RunKeys
from learner.group_queue import GroupQueue

logger = logging.getLogger(__name__)

T = TypeVar("T")
TRAIN_CREDIT = 1024  # of groups on their way here; what may be outstanding is bounded by admission, not by this
STATUS_EVERY_S = 1.0
RESUBMIT_S = 1.0
ROOM_CHECK_S = 0.05
GROUPS_HERE, GROUP_BYTES_HERE = 1024, 256 << 20  # that wait for the loop; more stay at the broker


class LearnerConnection:
    """Thread-safe: tickets and run states go out, scored groups come in.

    What waits here for the loop is bounded in groups and bytes (`groups`). Beyond that no lease is completed, so no
    more than `TRAIN_CREDIT` groups follow, the broker's stage `train` fills, and those before it wait.

    Args:
        incarnation: of this learner; larger than that of any earlier one.
        timeout_s: how long to wait for the broker.
        max_frame_bytes: the largest frame accepted from it.

    Raises:
        BrokerUnreachableError: no broker, wrong keys, or a newer learner leads the run (`superseded` is set then).
    """

    def __init__(
        self,
        endpoint: str,
        keys: RunKeys,
        incarnation: int,
        timeout_s: float = 30.0,
        max_frame_bytes: int = MAX_FRAME_BYTES,
    ) -> None:
        self.groups = GroupQueue(GROUPS_HERE, GROUP_BYTES_HERE)
        self.fleet: m.StatusReply | None = None
        self.superseded = threading.Event()  # a newer learner leads this run
        self.incarnation = incarnation
        self._open: dict[int, m.Ticket] = {}  # submitted and not answered; touched in the thread only
        self._refused: set[int] = set()  # open, and to be submitted again
        self._loop = asyncio.new_event_loop()
        self._client: BrokerClient | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._thread = threading.Thread(target=self._loop.run_forever, name="learner-connection", daemon=True)
        self._thread.start()
        self._await(self._start(endpoint, keys, timeout_s, max_frame_bytes), timeout_s=2 * timeout_s)

    def submit(self, tickets: list[m.Ticket]) -> None:
        """Offer tickets for generation. Each is answered by one group, whatever becomes of the broker."""

        def offer(client: BrokerClient) -> None:
            self._open.update({ticket.ticket_id: ticket for ticket in tickets})
            client.submit(tickets)

        if tickets:
            self._call(offer)

    def announce(self, state: m.RunState) -> None:
        """Tell everybody of a new run state."""
        self._call(lambda client: client.announce(state))

    def set_status(self, phase: str, waits_for: str, counters: dict[str, float]) -> None:
        """What the progress display says of the learner."""
        self._call(lambda client: client.set_status(phase, waits_for, counters))

    def note_progress(self) -> None:
        """A step is done."""
        self._call(lambda client: client.note_progress())

    def close(self) -> None:
        """Say goodbye and end the thread."""
        with contextlib.suppress(concurrent.futures.TimeoutError):
            self._await(self._stop(), timeout_s=5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)

    # ------------------------------------------------------------------ in the thread

    def _call(self, action: Callable[[BrokerClient], None]) -> None:
        client = self._client
        assert client is not None
        self._loop.call_soon_threadsafe(action, client)

    def _await(self, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)

    async def _start(self, endpoint: str, keys: RunKeys, timeout_s: float, max_frame_bytes: int) -> None:
        # The name holds the incarnation: a learner that wakes up after its successor has started is no known peer.
        name = f"learner-{self.incarnation}"
        client = BrokerClient(
            endpoint,
            keys,
            "learner",
            name,
            self.incarnation,
            on_connect=self._connected,
            on_superseded=self.superseded.set,
            on_refused=self._note_refused,
            max_frame_bytes=max_frame_bytes,
        )
        self._client = client
        await client.start(timeout_s)
        client.serve("train", TRAIN_CREDIT)
        loops = (self._receive(client), self._watch_fleet(client), self._resubmit_refused(client))
        self._tasks = [asyncio.create_task(loop) for loop in loops]

    async def _stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        assert self._client is not None
        await self._client.close()

    def _connected(self) -> None:
        client = self._client
        assert client is not None
        if client.state is not None:  # not the first contact: this broker may know neither state nor tickets
            logger.info("the broker is back: submitting %d open tickets again", len(self._open))
            client.announce(client.state)
            client.submit(list(self._open.values()))

    async def _receive(self, client: BrokerClient) -> None:
        while True:
            assignment = await client.assignments.get()
            while self.groups.full():
                await asyncio.sleep(ROOM_CHECK_S)
            if client.holds(assignment):  # else it comes again if it still counts
                self._accept(client, assignment)

    def _accept(self, client: BrokerClient, assignment: Assignment) -> None:
        try:
            group = m.decode_scored_group(assignment.payload)
        except m.MessageError as error:
            logger.error("a group could not be read, it will be delivered again: %s", error)
            client.release(assignment, RESUBMIT_S, str(error))
            return
        if self._open.pop(group.ticket.ticket_id, None) is not None:  # else it was delivered before
            self.groups.put(group, sum(map(len, assignment.payload)))
        client.complete(assignment)

    async def _watch_fleet(self, client: BrokerClient) -> None:
        while True:
            with contextlib.suppress(BrokerUnreachableError):
                self.fleet = await client.fleet_status()
            await asyncio.sleep(STATUS_EVERY_S)

    def _note_refused(self, tickets: tuple[int, ...]) -> None:
        logger.warning("the broker's queue is full: %d tickets wait", len(tickets))
        self._refused.update(ticket_id for ticket_id in tickets if ticket_id in self._open)

    async def _resubmit_refused(self, client: BrokerClient) -> None:
        while True:
            await asyncio.sleep(RESUBMIT_S)
            client.submit([self._open[ticket_id] for ticket_id in sorted(self._refused) if ticket_id in self._open])
            self._refused.clear()
