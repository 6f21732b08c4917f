"""The rewarder: takes generated groups, scores their texts, hands the scores back.

It sees texts and judgments only, never token arrays, and imports neither torch nor vLLM. A group one of whose
samples could not be scored because the engine was unavailable is released, not answered: it waits at the broker
and is tried again. So no number is ever invented for an outage. What no waiting mends (`FatalScoringError`) ends
the rewarder instead; the group is not answered either.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Sequence
from functools import partial
from typing import Any

from common import messages as m
from common.scores import InvalidOutput, Score, Scored, Unavailable
from common.tasks import Row
from common.tasks.row import from_reference
from common.transport.client import Assignment, BrokerClient
from rewarders.errors import FatalScoringError, ScoringError
from rewarders.scoring import Scorer
from rewarders.search_order import Turn, current_turn

logger = logging.getLogger(__name__)

RELEASE_DELAY_S = 2.0
DRAIN_S = 30.0
HELD_CHECK_S = 0.5


class Rewarder:
    """Scores up to `concurrent_groups` groups at a time."""

    def __init__(self, client: BrokerClient, scorer: Scorer, concurrent_groups: int) -> None:
        self._client = client
        self._scorer = scorer
        self._capacity = concurrent_groups
        self._tasks: set[asyncio.Task[None]] = set()
        self._draining = asyncio.Event()
        self._failed = asyncio.Event()
        self._fatal: FatalScoringError | None = None
        self._scored = 0
        self._unavailable = 0

    async def run(self) -> None:
        """Score until the run is finished, or until `drain`.

        Raises:
            FatalScoringError: no group can be scored until something is mended.
        """
        self._client.serve("score", self._capacity)
        taking = asyncio.create_task(self._take_groups())
        leaving = asyncio.create_task(self._draining.wait())
        finished = asyncio.create_task(self._wait_for_finish())
        failing = asyncio.create_task(self._failed.wait())
        background = (taking, leaving, finished, failing)
        try:
            done, _ = await asyncio.wait(background, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            if leaving in done and self._tasks:
                await asyncio.wait(self._tasks, timeout=DRAIN_S)
            if self._fatal is not None:
                raise self._fatal
        finally:
            for task in (*background, *self._tasks):
                task.cancel()
            await asyncio.gather(*background, *self._tasks, return_exceptions=True)

    def drain(self) -> None:
        """Leave politely: take nothing new, finish what is under way."""
        self._client.serve("score", 0)
        self._draining.set()

    async def _wait_for_finish(self) -> None:
        await self._client.wait_for_state(lambda state: state.finished)

    async def _take_groups(self) -> None:
        while True:
            assignment = await self._client.assignments.get()
            task = asyncio.create_task(self._score(assignment))
            self._tasks.add(task)
            task.add_done_callback(partial(self._score_ended, assignment))

    def _score_ended(self, assignment: Assignment, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, FatalScoringError):
            self._fatal = self._fatal or error
            self._failed.set()
        if self._client.holds(assignment):  # it failed or was cancelled: others must get it
            reason = "cancelled" if task.cancelled() else repr(error)
            logger.error("group %d is given back: %s", assignment.lease.item, reason)
            self._client.release(assignment, RELEASE_DELAY_S, reason)
        self._report()

    async def _score(self, assignment: Assignment) -> None:
        if not self._client.holds(assignment):
            return  # no quota is spent on what would be late
        started = time.monotonic()
        ticket: m.Ticket = m.decode(assignment.payload[0], m.Ticket)
        header: m.RolloutHeader = m.decode(assignment.payload[1], m.RolloutHeader)
        reference = decode_reference(ticket.reference)
        current_turn.set(Turn(header.oldest_version, ticket.ticket_id, ticket.kind == "eval"))
        texts = [sample.text for sample in header.samples]
        scores = await self._while_held(assignment, self._scorer.score_group(texts, reference))
        if scores is None:
            return
        outage = next((score for score in scores if isinstance(score, Unavailable)), None)
        if outage is not None:
            self._unavailable += 1
            delay_s = max(RELEASE_DELAY_S, outage.retry_after_s or 0.0)
            logger.warning("group %d waits %.1f s: %s", ticket.ticket_id, delay_s, outage.reason)
            self._client.release(assignment, delay_s, outage.reason)
            return
        self._scored += len(scores)
        seconds = time.monotonic() - started
        result = m.GroupScores(ticket.ticket_id, self._client.name, final_scores(scores), seconds)
        self._client.complete(assignment, [m.encode(result)])

    async def _while_held(
        self, assignment: Assignment, scoring: Coroutine[Any, Any, list[Score]]
    ) -> list[Score] | None:
        """What `scoring` returns; None where the lease is lost meanwhile: then what it waits for is given up, unless
        another group waits for it too."""
        task = asyncio.create_task(scoring)
        try:
            while self._client.holds(assignment):
                if (await asyncio.wait({task}, timeout=HELD_CHECK_S))[0]:
                    return task.result()
            return None
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def _report(self) -> None:
        counters = {
            "scored": float(self._scored),
            "unavailable": float(self._unavailable),
            **self._scorer.answerer.counters(),
        }
        waits_for = "" if self._tasks else "groups to score"
        self._client.set_status(f"scoring {len(self._tasks)} groups", waits_for, counters)


def decode_reference(reference: dict[str, Any]) -> Row:
    """The judgments in a ticket.

    Raises:
        ScoringError: they are not a task's row: the learner runs other code than this rewarder.
    """
    try:
        return from_reference(reference)
    except ValueError as error:
        raise ScoringError(
            f"the ticket's reference is {error}: learner and rewarders must run the same version of this package"
        ) from None


def final_scores(scores: Sequence[Score]) -> tuple[Scored | InvalidOutput, ...]:
    """The scores of a group none of which is `Unavailable`."""
    final = tuple(score for score in scores if isinstance(score, Scored | InvalidOutput))
    if len(final) != len(scores):
        raise ValueError("an Unavailable score can not be handed to the learner")
    return final
