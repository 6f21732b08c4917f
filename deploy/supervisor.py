"""Keeps the roles of a run at their wanted number, wherever they run: `Fleet` decides, `Role` does."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from deploy.fleet import Drain, Fleet, Kind, Outcome, Start

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 0.1
DRAIN_GRACE_S = 75.0  # longer than actors and rewarders take to finish what they have begun


class Role(ABC):
    """One role of a run and the process it has, or had. Nothing here blocks for long."""

    def __init__(self, name: str, log: Path) -> None:
        self.name = name
        self.log = log

    @abstractmethod
    async def start(self) -> None:
        """Start its process, or start it again after it has ended.

        Raises:
            OSError: the machine refused.
        """

    @property
    @abstractmethod
    def returncode(self) -> int | None:
        """Exit status of its newest process (negative: a signal); None while it runs or before its start."""

    @property
    @abstractmethod
    def running(self) -> bool:
        """Whether it was started and has not ended."""

    @property
    @abstractmethod
    def pid(self) -> int | None:
        """Of its newest process, on the machine it runs on."""

    @property
    def where(self) -> str:
        """Where its process runs, for people; "" for this machine."""
        return ""

    @property
    def note(self) -> str:
        """What keeps its process from running; "" where nothing does."""
        return ""

    @abstractmethod
    def error(self) -> str:
        """The one-line error the user can mend that it ended by; "" where there is none."""

    @abstractmethod
    def last_words(self) -> str:
        """That error, or else the last line of its log since its start."""

    @abstractmethod
    async def stop(self, grace_s: float) -> None:
        """Ask it to end (SIGTERM), and kill it with all its children after `grace_s` seconds."""


class Supervisor:
    """Carries out what a `Fleet` decides.

    Args:
        make: makes the role of a kind and name; it is started by the supervisor.
        warn: told of everything the user should know, in one line.
    """

    def __init__(self, fleet: Fleet, make: Callable[[Kind, str], Role], warn: Callable[[str], None]) -> None:
        self.fleet = fleet
        self.roles: dict[str, Role] = {}
        self.failure = ""  # why the outcome is `failed`
        self._make = make
        self._warn = warn
        self._starting: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> Outcome:
        """Supervise until the learner has ended for good, or a role has to be given up."""
        while self.fleet.outcome is None:
            self.look(time.monotonic())
            await asyncio.sleep(LOOK_EVERY_S)
        return self.fleet.outcome

    def look(self, now: float) -> None:
        """Take note of what has ended, and begin what is to be done."""
        for name, role in list(self.roles.items()):
            member = self.fleet.members.get(name)
            if member is None:
                del self.roles[name]
            elif member.phase in ("up", "draining") and name not in self._starting and role.returncode is not None:
                self._ended(role, role.returncode, now)
        for action in self.fleet.actions(now):
            match action:
                case Start(name):
                    self._starting.add(name)
                    self._begin(self._start(name))
                case Drain(name):
                    logger.info("%s is asked to leave", name)
                    self._begin(self._drain(name))

    async def stop(self, name: str, grace_s: float) -> int | None:
        """End one role for good; its exit status, None where it was not running."""
        role = self.roles.get(name)
        if role is None or not role.running:
            return None
        await role.stop(grace_s)
        return role.returncode

    async def stop_all(self, grace_s: float) -> None:
        """End everything at the same time. Nothing is started any more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(role.stop(grace_s) for role in self.roles.values()))

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _start(self, name: str) -> None:
        member = self.fleet.members[name]
        role = self.roles.get(name)
        if role is None:
            role = self.roles[name] = self._make(member.kind, name)
        try:
            await role.start()
        except OSError as error:  # no memory, no process, no disk: as good as a death
            self._report(name, self.fleet.ended(name, 1, "", time.monotonic()).verdict, f"cannot start: {error}", role)
        finally:
            self._starting.discard(name)

    async def _drain(self, name: str) -> None:
        while name in self._starting:
            await asyncio.sleep(LOOK_EVERY_S)
        role = self.roles.get(name)
        if role is not None:
            with contextlib.suppress(ProcessLookupError):
                await role.stop(DRAIN_GRACE_S)

    def _ended(self, role: Role, status: int, now: float) -> None:
        ended = self.fleet.ended(role.name, status, role.error(), now)
        if role.name not in self.fleet.members:  # drained: the name is free for another process
            del self.roles[role.name]
        self._report(role.name, ended.verdict, describe_end(status, role.last_words()), role)

    def _report(self, name: str, verdict: str, what: str, role: Role) -> None:
        match verdict:
            case "again":
                self._warn(f"{name} is started again, it {what}")
            case "left":
                logger.info("%s has left: %s", name, what)
            case "gave up":
                self.failure = f"{name} dies again and again, it {what} (log: {role.log})"
            case "hopeless":
                self.failure = f"{name} cannot go on: {role.last_words()} (log: {role.log})"
            case "failed":
                self.failure = f"the {name} {what} (log: {role.log})"


def describe_end(status: int, words: str) -> str:
    """How a process ended, in words; `words` are its own last ones."""
    if status < 0:
        known = {number.value: number.name for number in signal.Signals}
        return f"was killed by {known.get(-status, f'signal {-status}')}"
    return f"ended with status {status}: {words}" if words else f"ended with status {status}"
