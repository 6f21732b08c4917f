"""How the roles of a run are doing: judged by progress, not by mere life. Pure: all times come in as arguments."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from common import off_peak
from common.messages import PeerEntry, StatusReply

STALLED_AFTER_S = 30.0  # without progress while waiting for something
SILENT_AFTER_S = 15.0  # without a heartbeat
DEAF_AFTER_S = 10.0  # a broker that answers no status request, a search server that accepts no connection
SERVES_WITHIN_S = 120.0  # of its start; an index may have to be built

State = Literal["starting", "running", "stalled", "silent", "stopped", "dead"]
TROUBLED: tuple[State, ...] = ("stalled", "silent")


class RoleState(msgspec.Struct, frozen=True):
    """One role at one moment.

    Attributes:
        state: `stalled`: it waits for something and makes no progress, or does not serve; `silent`: no heartbeat.
        since_s: seconds since its last progress (`silent`: since its last heartbeat); None where it is not known.
        leases: groups in its hands.
        where: the machine it runs on; "" for the launcher's.
        peer: its name at the broker, "" where that is its own.
        leaving: it was asked to leave, and finishes what it has begun.
    """

    name: str
    role: str
    state: State
    phase: str = ""
    waits_for: str = ""
    since_s: float | None = None
    leases: int = 0
    where: str = ""
    pid: int | None = None
    peer: str = ""
    leaving: bool = False

    def snapshot(self) -> dict[str, Any]:
        """As `common.tracking.progress_state` takes it."""
        return {name: getattr(self, name) for name in ("name", "state", "phase", "waits_for", "since_s")}

    @property
    def trouble(self) -> str:
        """What is wrong, in words."""
        if self.state == "silent":
            return f"no sign of life for {self.since_s or 0.0:.0f} s"
        if not self.waits_for:
            return self.phase
        return f"waits for {self.waits_for}, no progress for {self.since_s or 0.0:.0f} s"


@dataclass(frozen=True)
class RoleView:
    """What the launcher knows of a role by itself.

    Attributes:
        lived_s: age of its newest process in seconds.
        deaf_s: broker, search server: seconds since one of that name last answered; None for the others.
        note: what keeps it from running.
    """

    name: str
    role: str
    returncode: int | None
    lived_s: float
    leaving: bool = False
    deaf_s: float | None = None
    note: str = ""
    where: str = ""
    pid: int | None = None


def peer_state(peer: PeerEntry, where: str = "", pid: int | None = None) -> RoleState:
    """A role as the broker knows it."""
    status = peer.status
    state: State = "running"
    since_s, waits_for = status.progress_age_s, status.waits_for
    if peer.silent_s > SILENT_AFTER_S:
        state, since_s, waits_for = "silent", peer.silent_s, "a sign of life"
    elif since_s > STALLED_AFTER_S and waits_for and waits_for != off_peak.WAITS_FOR:
        state = "stalled"
    return RoleState(peer.name, peer.role, state, status.phase, waits_for, since_s, peer.leases, where, pid)


class Health:
    """States of the launcher's roles, and the news about them.

    Invariants: a role's trouble is told once when it begins and once when it ends; a role that the broker never met
    since its process started is `starting`, one that it met and forgot is `silent`.
    """

    def __init__(self) -> None:
        self._met: dict[str, float] = {}  # by name: how old its process was when the broker was last seen to know it
        self._troubled: dict[str, float] = {}  # by name: since when

    def states(self, views: Sequence[RoleView], fleet: StatusReply | None, fleet_age_s: float = 0.0) -> list[RoleState]:
        """One state per role, in the same order; `fleet_age_s`: seconds since the broker said so."""
        peers = list(fleet.peers) if fleet else []
        return [self._state(view, _peer_of(view, peers, fleet_age_s)) for view in views]

    def news(self, states: Iterable[RoleState], now: float) -> list[str]:
        """What has changed for the worse or the better since the last call, in one line each."""
        lines = []
        troubled = {state.name: state for state in states if state.state in TROUBLED}
        for name in [name for name in self._troubled if name not in troubled]:
            lines.append(f"{name} is well again after {now - self._troubled.pop(name):.0f} s")
        for name, state in troubled.items():
            if name not in self._troubled:
                self._troubled[name] = now
                lines.append(f"{name} is {state.state}: {state.trouble}")
        return lines

    def _state(self, view: RoleView, peer: PeerEntry | None) -> RoleState:
        plain = RoleState(view.name, view.role, "running", where=view.where, pid=view.pid, leaving=view.leaving)
        if view.returncode is not None:
            self._met.pop(view.name, None)
            return msgspec.structs.replace(plain, state="stopped" if view.returncode in (0, 130) else "dead")
        if view.note:
            return msgspec.structs.replace(plain, state="starting", phase=view.note)
        if view.deaf_s is not None:
            return msgspec.structs.replace(plain, **_serving(view, view.deaf_s))
        return self._of_worker(view, peer, plain)

    def _of_worker(self, view: RoleView, peer: PeerEntry | None, plain: RoleState) -> RoleState:
        """Roles that report to the broker."""
        if peer is not None:
            self._met[view.name] = view.lived_s
            name = "" if peer.name == view.name else peer.name
            state = msgspec.structs.replace(peer_state(peer, view.where, view.pid), name=view.name, peer=name)
            if view.leaving:
                return msgspec.structs.replace(state, phase=f"leaving, {state.phase}", leaving=True)
            return state
        met_at = self._met.get(view.name)
        if met_at is None or met_at > view.lived_s:
            self._met.pop(view.name, None)
            return msgspec.structs.replace(plain, state="starting")
        since_s = view.lived_s - met_at
        if since_s <= SILENT_AFTER_S:
            return plain
        return msgspec.structs.replace(plain, state="silent", waits_for="a sign of life", since_s=since_s)


def _serving(view: RoleView, deaf_s: float) -> dict[str, Any]:
    """State and phase of a role that is judged by its answers."""
    starting = deaf_s > view.lived_s  # what answered last was an earlier process
    if min(deaf_s, view.lived_s) <= (SERVES_WITHIN_S if starting else DEAF_AFTER_S):
        return {"state": "starting" if starting else "running"}
    what = "answers no status request" if view.role == "broker" else "accepts no connection"
    return {"state": "stalled", "phase": what, "since_s": min(deaf_s, view.lived_s)}


def _peer_of(view: RoleView, peers: Sequence[PeerEntry], age_s: float) -> PeerEntry | None:
    """The broker's entry of a role. A learner's name there holds its incarnation: the one heard of last counts.

    An entry last heard of before the role's process started is that of an earlier one.
    """
    if view.role == "learner":
        own = [peer for peer in peers if peer.role == "learner"]
    else:
        own = [peer for peer in peers if peer.name == view.name]
    newest = min(own, key=lambda peer: peer.silent_s, default=None)
    return newest if newest is not None and newest.silent_s + age_s < view.lived_s else None
