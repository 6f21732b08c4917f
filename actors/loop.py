"""The actor: takes tickets, generates groups, and keeps its engine on the learner's newest weights.

Three things go on at the same time: up to `concurrent_groups` generations in the engine's running batch, one
weight transfer at most, and the broker's heartbeat. New weights enter between two tokens; generations under way
go on and their version spans say which tokens came from which weights. A ticket is never begun with weights
older than its `min_version`: that is the actor's half of the staleness guarantee (`learner.ledger`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from functools import partial

import numpy as np

from actors.engine import Completion, Engine, EngineDiedError, EngineError, GenerationRequest, mix_seed
from actors.prompts import PromptEncoder
from actors.weight_receiver import WeightReceiver, WeightTransferError
from common import messages as m
from common.transport.client import Assignment, BrokerClient

logger = logging.getLogger(__name__)

STOP = "</answer>"
RETRY_WEIGHTS_S = 0.5
GIVE_BACK_S = 1.0  # how long a group whose generation failed waits before another actor gets it
DRAIN_S = 60.0  # a leaving actor finishes what it has begun, for so long at most


class Actor:
    """One engine between the broker and the learner's weights."""

    def __init__(
        self,
        client: BrokerClient,
        engine: Engine,
        receiver: WeightReceiver,
        encode: PromptEncoder,
        concurrent_groups: int,
    ) -> None:
        self._client = client
        self._engine = engine
        self._receiver = receiver
        self._encode = encode
        self._capacity = concurrent_groups
        self._weights: tuple[int, int] = (-1, -1)  # incarnation, version in the engine
        self._weights_changed = asyncio.Condition()
        self._generations: set[asyncio.Task[None]] = set()
        self._decoding: set[asyncio.Task[None]] = set()  # those that have begun
        self._started = time.monotonic()
        self._draining = asyncio.Event()

    async def run(self) -> None:
        """Generate until the learner says the run is finished, or until `drain`.

        Raises:
            EngineDiedError: the engine is gone; start the actor again.
        """
        following = asyncio.create_task(self._follow_weights())
        taking = asyncio.create_task(self._take_tickets())
        leaving = asyncio.create_task(self._draining.wait())
        finished = asyncio.create_task(self._wait_for_finish())
        background = (following, taking, leaving, finished)
        try:
            done, _ = await asyncio.wait(background, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            if leaving in done:
                await self._finish_generations()
        finally:
            for task in (*background, *self._generations):
                task.cancel()
            await asyncio.gather(*background, *self._generations, return_exceptions=True)

    def drain(self) -> None:
        """Leave politely: take nothing new, finish what is under way."""
        self._client.serve("rollout", 0)
        self._draining.set()

    # ------------------------------------------------------------------ weights

    async def _follow_weights(self) -> None:
        while True:
            wanted = await self._client.wait_for_state(
                lambda state: bool(state.weights_endpoint) and (state.incarnation, state.version) != self._weights
            )
            try:
                await self._load(wanted)
            except (WeightTransferError, EngineError) as error:
                if isinstance(error, EngineDiedError):
                    raise
                logger.warning("weights of version %d not loaded: %s", wanted.version, error)
                await asyncio.sleep(RETRY_WEIGHTS_S)

    async def _load(self, state: m.RunState) -> None:
        if state.incarnation != self._weights[0]:
            self._void_generations()
        path = await self._receiver.pull(state)
        await self._engine.load_weights(path, state.version)
        first = self._weights[0] < 0
        async with self._weights_changed:
            self._weights = (state.incarnation, state.version)
            self._weights_changed.notify_all()
        self._client.note_progress()
        if first and not self._draining.is_set():
            self._client.serve("rollout", self._capacity)
        self._report()

    def _void_generations(self) -> None:
        """A new learner has started: whatever has begun belongs to the old one; what waits may be the new one's."""
        for task in self._decoding:
            task.cancel()

    # ------------------------------------------------------------------ generation

    async def _take_tickets(self) -> None:
        while True:
            assignment = await self._client.assignments.get()
            task = asyncio.create_task(self._generate(assignment))
            self._generations.add(task)
            task.add_done_callback(partial(self._generation_ended, assignment))

    def _generation_ended(self, assignment: Assignment, task: asyncio.Task[None]) -> None:
        self._generations.discard(task)
        self._decoding.discard(task)
        self._report()
        if self._client.holds(assignment):  # it failed or was cancelled: others must get it
            reason = "cancelled" if task.cancelled() else repr(task.exception())
            logger.warning("group %d is given back: %s", assignment.lease.item, reason)
            self._client.release(assignment, GIVE_BACK_S, reason)
        if not task.cancelled() and isinstance(task.exception(), EngineDiedError):
            self._draining.set()

    async def _generate(self, assignment: Assignment) -> None:
        ticket: m.Ticket = m.decode(assignment.payload[0], m.Ticket)
        async with self._weights_changed:
            await self._weights_changed.wait_for(lambda: self._may_generate(ticket))
        if not self._client.holds(assignment):
            return
        task = asyncio.current_task()
        assert task is not None
        self._decoding.add(task)
        started = time.monotonic()
        prompt_ids = self._encode(ticket.messages)
        try:
            completions = await self._engine.generate(request_of(ticket, assignment.lease.lease, prompt_ids))
        except ValueError as error:  # e.g. a prompt that is too long for the engine
            logger.error("ticket %d cannot be generated: %s", ticket.ticket_id, error)
            self._client.release(assignment, 30.0, str(error))
            return
        rollout = build_rollout(ticket, self._client.name, prompt_ids, completions, time.monotonic() - started)
        self._client.complete(assignment, m.encode_rollout(rollout))

    def _may_generate(self, ticket: m.Ticket) -> bool:
        """Whether the engine holds weights of the present learner that are new enough for a ticket.

        The broker announces a new learner before it hands out that learner's tickets, so the state known here
        is never older than the ticket.
        """
        state = self._client.state
        incarnation, version = self._weights
        return state is not None and incarnation == state.incarnation and version >= ticket.min_version

    async def _finish_generations(self) -> None:
        died = [task for task in self._generations if task.done() and task.exception()]
        if self._generations and not died:
            await asyncio.wait(self._generations, timeout=DRAIN_S)

    # ------------------------------------------------------------------ status

    async def _wait_for_finish(self) -> None:
        await self._client.wait_for_state(lambda state: state.finished)

    def _report(self) -> None:
        stats = self._engine.stats
        waits_for = "" if self._generations else "tickets"
        counters = {
            "generated_tokens": float(stats.generated_tokens),
            "finished_requests": float(stats.finished_requests),
            "busy_s": stats.busy_s,
            "stall_s": stats.stall_s,
            "alive_s": time.monotonic() - self._started,
            "weight_version": float(self._weights[1]),
        }
        self._client.set_status(f"generating {len(self._generations)} groups", waits_for, counters)


def request_of(ticket: m.Ticket, lease: int, prompt_ids: list[int]) -> GenerationRequest:
    """What the engine is asked for a ticket. The seed depends on the ticket alone, so a redelivery repeats it."""
    sampling = ticket.sampling
    return GenerationRequest(
        request_id=f"{ticket.ticket_id}-{lease}",
        prompt_ids=prompt_ids,
        n=sampling.samples,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_tokens=sampling.max_tokens,
        stop=STOP,
        seed=None if sampling.seed is None else mix_seed(sampling.seed, ticket.ticket_id) % (1 << 31),
    )


def build_rollout(
    ticket: m.Ticket, actor: str, prompt_ids: list[int], completions: Sequence[Completion], seconds: float
) -> m.Rollout:
    """The group as it goes to the broker."""
    samples = tuple(m.SampleHeader(c.text, len(c.token_ids), c.finish_reason, tuple(c.spans)) for c in completions)
    return m.Rollout(
        header=m.RolloutHeader(ticket.ticket_id, actor, len(prompt_ids), samples, seconds),
        prompt_ids=np.asarray(prompt_ids, dtype=np.int32),
        token_ids=np.concatenate([c.token_ids for c in completions]).astype(np.int32, copy=False),
        logprobs=np.concatenate([c.logprobs for c in completions]).astype(np.float32, copy=False),
    )


async def run_actor(actor: Actor, engine: Engine, receiver: WeightReceiver, client: BrokerClient) -> None:
    """Run an actor to its end and leave nothing behind, however it ends."""
    try:
        await actor.run()
    finally:
        with contextlib.suppress(Exception):
            await engine.close()
        await client.close()
        receiver.close()
