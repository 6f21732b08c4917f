"""A real broker and real rewarders, each a process of its own, between a learner and an actor of the benchmark's.

The actor "generates" texts that the benchmark gives it; everything behind it is what a run has.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from common import messages as m
from common.config import Config, load_config
from common.run_folder import RunFolder
from common.scores import InvalidOutput, Scored
from common.tasks import Row
from common.tasks.row import to_reference
from common.transport.client import BrokerClient
from common.transport.keys import load_run_keys
from deploy.run_setup import prepare_folder
from deploy.sites import free_port

LOOPBACK = "127.0.0.1"
END_WITHIN_S = 15.0


@dataclass(frozen=True)
class GroupResult:
    """The scores of one group as they reached the learner."""

    ticket: int
    scores: tuple[Scored | InvalidOutput, ...]


class RewarderFleet:
    """Use it as an async context manager, then start rewarders and send groups.

    Args:
        folder: becomes the run's folder.
        settings: overrides of the default config, as `search.url=…`.
        capacity: scored groups the learner holds at a time.
    """

    def __init__(self, folder: Path, settings: Sequence[str], capacity: int = 256) -> None:
        self._folder = RunFolder(folder)
        self._settings = [*settings, f"broker.port={free_port(LOOPBACK)}"]
        self._capacity = capacity
        self._texts: dict[int, Sequence[str]] = {}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._acting: asyncio.Task[None] | None = None
        self.config: Config

    async def start(self) -> None:
        """Start the broker and connect learner and actor."""
        self._folder.path.mkdir(parents=True, exist_ok=True)
        self._folder.logs.mkdir(exist_ok=True)
        self._folder.config.write_text("{}\n")
        self.config = load_config(self._folder.config, self._settings)
        prepare_folder(self._folder, self.config, resume=True)
        self._endpoint = f"tcp://{LOOPBACK}:{self.config.broker.port}"
        self._start("broker", "broker", [])
        self.learner, self._actor = [await self.join(role, f"{role}-0") for role in ("learner", "actor")]
        self._actor.serve("rollout", self._capacity)
        self.learner.serve("train", self._capacity)
        self._acting = asyncio.create_task(self._act())

    async def close(self) -> None:
        """End every process."""
        if self._acting is not None:
            self._acting.cancel()
            await asyncio.gather(self._acting, return_exceptions=True)
            await self.learner.close()
            await self._actor.close()
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            try:
                await asyncio.to_thread(process.wait, END_WITHIN_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def start_rewarder(self, name: str, environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start one more, with what `environment` adds; its log is `logs/NAME.log`."""
        return self._start("rewarder", name, ["--connect", self._endpoint, "--name", name], environment or {})

    async def join(self, role: m.Role, name: str) -> BrokerClient:
        """Connect to the broker from this process."""
        client = BrokerClient(self._endpoint, load_run_keys(self._folder.keys, role), role, name, incarnation=1)
        await client.start()
        return client

    def log(self, name: str) -> str:
        """What a process has written."""
        return (self._folder.logs / f"{name}.log").read_text()

    def send(self, ticket: int, row: Row, texts: Sequence[str]) -> None:
        """Let the actor answer a ticket with these texts."""
        self._texts[ticket] = texts
        sampling = m.Sampling(samples=len(texts), temperature=1.0, top_p=1.0, max_tokens=512)
        message = (m.ChatMessage("user", row.text),)
        self.learner.submit([m.Ticket(ticket, "train", row.id, 0, message, to_reference(row), sampling, 0)])

    async def receive(self) -> GroupResult:
        """The next group that comes back scored."""
        assignment = await self.learner.assignments.get()
        group = m.decode_scored_group(assignment.payload)
        self.learner.complete(assignment)
        return GroupResult(group.ticket.ticket_id, group.scores.scores)

    # ------------------------------------------------------------------ inside

    def _start(
        self, role: str, name: str, options: Sequence[str], environment: dict[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "deploy.cli", role, str(self._folder.config), *options]
        command += ["--parent", str(os.getpid())]
        with (self._folder.logs / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, env={**os.environ, **(environment or {})}
            )
        self._processes.append(process)
        return process

    async def _act(self) -> None:
        while True:
            assignment = await self._actor.assignments.get()
            ticket: m.Ticket = m.decode(assignment.payload[0], m.Ticket)
            texts = self._texts.pop(ticket.ticket_id)
            samples = tuple(m.SampleHeader(text, 1, "stop", (m.WeightSpan(0, 0, 1),)) for text in texts)
            header = m.RolloutHeader(ticket.ticket_id, "actor-0", 1, samples)
            ones = np.ones(len(texts), np.int32)
            rollout = m.Rollout(header, ones[:1], ones, ones.astype(np.float32))
            self._actor.complete(assignment, m.encode_rollout(rollout))
