"""Which roles a run has, and what is to be done about each of them: a pure state machine, without clock or process.

Ends of processes, wishes and the time (seconds on the caller's clock) come in as arguments; what is to be started or
drained comes out of `actions`. See `deploy.supervisor` for the part that does it.

Invariants, after every call:

1. A role has one process at most: `Start` is given for a role only if its last process is known to have ended.
2. Of each elastic kind, the roles that are neither draining nor gone number exactly what was last wished for.
3. Names are unique, and a name is free again only when its process has ended.
4. Who drains is the youngest of its kind, is asked once, is never started again, and is forgotten when it has ended.
5. Whatever ends unasked is started again after its pause (`deploy.restarts`), unless the run is at its end; the run
   ends only with the learner, with a role that dies again and again, or with one that says it is hopeless.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from deploy.restarts import HOPELESS, RestartRule, learner_end

Kind = Literal["search-server", "broker", "actor", "learner", "rewarder"]
ELASTIC: tuple[Kind, ...] = ("actor", "rewarder")
Phase = Literal["due", "up", "draining", "left"]
Outcome = Literal["completed", "stopped", "failed"]


@dataclass(frozen=True)
class Start:
    """Start a role, for the first time or again."""

    name: str


@dataclass(frozen=True)
class Drain:
    """Ask a role to leave; it may finish what it has begun."""

    name: str


@dataclass(frozen=True)
class Ended:
    """What follows from the end of a process.

    verdict: `again` (after `pause_s` seconds), `left` (as it should), `gave up`, `hopeless` (by its own account), or
    how the learner ended the run.
    """

    verdict: Literal["again", "left", "gave up", "hopeless", "completed", "stopped", "failed"]
    pause_s: float = 0.0


@dataclass
class Member:
    """One role of the run. `lives`: how often it was started; `due_at` counts while it is due."""

    name: str
    kind: Kind
    phase: Phase = "due"
    due_at: float = 0.0
    started_at: float = 0.0
    lives: int = 0
    rule: RestartRule = field(default_factory=RestartRule)


class Fleet:
    """The roles of one run, in the order in which they were added.

    Args:
        learner_ranks: processes of the learner (see `learner_end`).
    """

    def __init__(self, learner_ranks: int = 1) -> None:
        self.members: dict[str, Member] = {}
        self.outcome: Outcome | None = None
        self._ranks = learner_ranks
        self._finishing = False
        self._to_drain: list[str] = []

    # ------------------------------------------------------------------ what is wanted

    def add(self, kind: Kind, name: str | None = None) -> str:
        """One more role, to be started at once; returns its name."""
        name = name or self._free_name(kind)
        assert name not in self.members, name
        self.members[name] = Member(name, kind)
        return name

    def scale(self, kind: Kind, wanted: int) -> None:
        """From now on there are to be `wanted` roles of an elastic kind."""
        assert kind in ELASTIC, kind
        if self._finishing or self.outcome is not None:
            return
        present = self.present(kind)
        for _ in range(wanted - len(present)):
            self.add(kind)
        for member in reversed(present[wanted:]):
            if member.phase == "up":
                member.phase = "draining"
                self._to_drain.append(member.name)
            else:
                del self.members[member.name]

    def finish(self) -> None:
        """The learner has announced the end: who leaves politely now is not missed."""
        self._finishing = True

    def present(self, kind: Kind) -> list[Member]:
        """The roles of a kind that are neither draining nor gone, the youngest last."""
        return [m for m in self.members.values() if m.kind == kind and m.phase in ("due", "up")]

    def draining(self, kind: Kind) -> list[Member]:
        """The roles of a kind that were asked to leave."""
        return [m for m in self.members.values() if m.kind == kind and m.phase == "draining"]

    # ------------------------------------------------------------------ what happens

    def ended(self, name: str, status: int, error: str, now: float) -> Ended:
        """The process of a role has ended.

        Args:
            status: as of `subprocess`, negative for a signal.
            error: the one-line error the user can mend that it ended by, or "".
        """
        member = self.members[name]
        if member.phase == "draining":
            del self.members[name]
            self._to_drain = [other for other in self._to_drain if other != name]  # not whoever bears its name next
            return Ended("left")
        if member.kind == "learner":
            end = learner_end(status, self._ranks, error)
            if end != "again":
                self.outcome = end
                member.phase = "left"
                return Ended(end)
        elif status == 0 and self._finishing:
            member.phase = "left"
            return Ended("left")
        elif status == HOPELESS:
            return self._given_up(member, "hopeless")
        pause_s = member.rule.pause_after(status, now - member.started_at)
        if pause_s is None:
            return self._given_up(member, "gave up")
        member.phase, member.due_at = "due", now + pause_s
        return Ended("again", pause_s)

    def _given_up(self, member: Member, verdict: Literal["gave up", "hopeless"]) -> Ended:
        self.outcome = "failed"
        member.phase = "left"
        return Ended(verdict)

    def actions(self, now: float) -> list[Start | Drain]:
        """What is to be done now; each action is given once."""
        drains, self._to_drain = [Drain(name) for name in self._to_drain], []
        if self.outcome is not None:
            return [*drains]
        return [*drains, *(self._start(m, now) for m in self.members.values() if self._is_due(m, now))]

    def _is_due(self, member: Member, now: float) -> bool:
        return member.phase == "due" and (member.lives == 0 or now >= member.due_at)

    def _start(self, member: Member, now: float) -> Start:
        member.phase, member.started_at = "up", now
        member.lives += 1
        return Start(member.name)

    def _free_name(self, kind: Kind) -> str:
        index = 0
        while f"{kind}-{index}" in self.members:
            index += 1
        return f"{kind}-{index}"
