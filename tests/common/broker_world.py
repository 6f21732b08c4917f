"""What the broker's tests share: small groups, a broker in a thread, clients that say goodbye."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np

from common import messages as m
from common.broker.server import BrokerServer
from common.broker.service import BrokerService, BrokerSettings
from common.scores import Scored
from common.transport.client import Assignment, BrokerClient
from common.transport.keys import load_run_keys


def ticket(number: int, kind: str = "train") -> m.Ticket:
    return m.Ticket(
        ticket_id=number,
        kind=kind,  # type: ignore[arg-type]
        prompt_id=f"q{number}",
        epoch=0,
        messages=(m.ChatMessage("user", "does aspirin help?"),),
        reference={"relevant": ["1"]},
        sampling=m.Sampling(samples=2, temperature=1.0, top_p=1.0, max_tokens=8),
        min_version=0,
    )


def rollout(number: int, tokens: int = 5, version: int = 0) -> m.Rollout:
    sample = m.SampleHeader("text", tokens, "stop", (m.WeightSpan(version, 0, tokens),))
    return m.Rollout(
        m.RolloutHeader(number, "actor-1", 3, (sample, sample)),
        np.array([1, 2, 3], np.int32),
        np.arange(2 * tokens, dtype=np.int32),
        np.linspace(-1, 0, 2 * tokens).astype(np.float32),
    )


def scores(number: int) -> m.GroupScores:
    return m.GroupScores(number, "rewarder-1", (Scored(1.0, {"recall": 0.5}, "a", 3),) * 2)


class RunningBroker:
    """hours: the quota is closed for hours[0][0] seconds, because of hours[0][1]."""

    def __init__(
        self, keys_dir: Path, settings: BrokerSettings, port: int = 0, hours: list[tuple[float, str]] | None = None
    ) -> None:
        self.service = BrokerService(settings, time.monotonic())
        quota_hours = (lambda: hours[0]) if hours else None
        self.server = BrokerServer(self.service, load_run_keys(keys_dir, "broker"), quota_hours=quota_hours)
        self.endpoint = self.server.bind("127.0.0.1", port)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self.server.run, args=(self._stop.is_set, 0.05))
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


@contextlib.asynccontextmanager
async def peer(
    endpoint: str, keys_dir: Path, role: m.Role, name: str = "", **options: int
) -> AsyncIterator[BrokerClient]:
    client = BrokerClient(endpoint, load_run_keys(keys_dir, role), role, name or f"{role}-1", **options)
    await client.start(timeout_s=5)
    try:
        yield client
    finally:
        await client.close()


async def next_assignment(client: BrokerClient, seconds: float = 3.0) -> Assignment:
    return await asyncio.wait_for(client.assignments.get(), seconds)


async def status_when(client: BrokerClient, satisfied: Callable[[m.StatusReply], bool]) -> m.StatusReply:
    """The first status that satisfies a condition; messages of other connections may take a moment."""
    deadline = time.monotonic() + 5
    while not satisfied(status := await client.fleet_status()):
        assert time.monotonic() < deadline, status
        await asyncio.sleep(0.02)
    return status
