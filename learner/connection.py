"""The learner's line to the broker: a `BrokerClient` in a thread of its own, so that training never waits for it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from common import messages as m
from common.transport.client import BrokerClient, BrokerUnreachableError
from common.transport.keys import RunKeys

logger = logging.getLogger(__name__)

T = TypeVar("T")
TRAIN_CREDIT = 1 << 16  # what may be outstanding is bounded by admission, not by this
STATUS_EVERY_S = 1.0
RESUBMIT_S = 1.0


class LearnerConnection:
    """Thread-safe: tickets and run states go out, scored groups come in.

    Args:
        incarnation: of this learner; larger than that of any earlier one.
    """

    def __init__(self, endpoint: str, keys: RunKeys, incarnation: int) -> None:
        self.groups: queue.Queue[m.ScoredGroup] = queue.Queue()
        self.fleet: m.StatusReply | None = None
        self.new_broker = threading.Event()  # its queues are empty: submit the outstanding tickets again
        self.incarnation = incarnation
        self._loop = asyncio.new_event_loop()
        self._client: BrokerClient | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._thread = threading.Thread(target=self._loop.run_forever, name="learner-connection", daemon=True)
        self._thread.start()
        self._await(self._start(endpoint, keys), timeout_s=60)

    def submit(self, tickets: list[m.Ticket]) -> None:
        """Offer tickets for generation."""
        if tickets:
            self._call(lambda client: client.submit(tickets))

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

    async def _start(self, endpoint: str, keys: RunKeys) -> None:
        client = BrokerClient(endpoint, keys, "learner", "learner", self.incarnation, self._connected)
        self._client = client
        await client.start()
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
        assert self._client is not None
        if self._client.state is not None:  # this broker is not the first: it knows neither state nor tickets
            self._client.announce(self._client.state)
            self.new_broker.set()

    async def _receive(self, client: BrokerClient) -> None:
        while True:
            assignment = await client.assignments.get()
            try:
                group = m.decode_scored_group(assignment.payload)
            except m.MessageError as error:
                logger.error("a group could not be read, it will be delivered again: %s", error)
                client.release(assignment, RESUBMIT_S, str(error))
                continue
            self.groups.put(group)
            client.complete(assignment)

    async def _watch_fleet(self, client: BrokerClient) -> None:
        while True:
            with contextlib.suppress(BrokerUnreachableError):
                self.fleet = await client.fleet_status()
            await asyncio.sleep(STATUS_EVERY_S)

    async def _resubmit_refused(self, client: BrokerClient) -> None:
        while True:
            refused = await client.refused.get()
            logger.warning("the broker's queue is full: %d tickets wait", len(refused))
            await asyncio.sleep(RESUBMIT_S)
            self.new_broker.set()  # submitting everything outstanding again is idempotent
