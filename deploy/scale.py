"""`deepretrieval scale RUN`: another number of actors or rewarders while the run goes on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from deploy.errors import LaunchError
from deploy.live_run import FleetWish, RunReport, is_live, read_report, read_wish, write_wish
from deploy.role_states import RoleState

LOOK_EVERY_S = 0.2
SETTLED = ("running", "stalled", "silent")  # the broker knows it


def run(folder: Path, actors: int | None, rewarders: int | None, timeout_s: float) -> int:
    """Ask the launcher for another size and wait until the fleet has it; the exit status.

    Raises:
        LaunchError: nothing asked for, the run is not live, or the fleet does not get there in time.
    """
    if actors is None and rewarders is None:
        raise LaunchError("say how many are wanted: --actors N, --rewarders N, or both")
    _require_live(folder)
    before = read_report(folder)
    wish = write_wish(folder, actors, rewarders)
    deadline = time.monotonic() + timeout_s
    while not _fulfilled(read_report(folder), wish):
        _require_live(folder)
        newest = read_wish(folder)
        if newest is not None and newest.serial > wish.serial:
            raise LaunchError("another `deepretrieval scale` has taken this one's place")
        if time.monotonic() > deadline:
            raise LaunchError(f"not there after {timeout_s:.0f} s, it goes on: {_missing(read_report(folder), wish)}")
        time.sleep(LOOK_EVERY_S)
    for line in changes(before, read_report(folder), wish):
        print(line)
    return 0


def _require_live(folder: Path) -> None:
    if not folder.is_dir():
        raise LaunchError(f"{folder} is not a run's folder: name the one that `deepretrieval train` made")
    if not is_live(folder):
        raise LaunchError(f"the run in {folder} is not live: no launcher holds it (start it with --resume)")


def _wanted(wish: FleetWish) -> list[tuple[str, int]]:
    pairs = (("actor", wish.actors), ("rewarder", wish.rewarders))
    return [(role, count) for role, count in pairs if count is not None]


def _fulfilled(report: RunReport | None, wish: FleetWish) -> bool:
    """Whether as many roles as wished for are at work, and no others are left."""
    if report is None or report.wish < wish.serial:
        return False
    for role, count in _wanted(wish):
        states = _of(report, role)
        if len(states) != count or any(state.state not in SETTLED or state.leaving for state in states):
            return False
    return True


def _missing(report: RunReport | None, wish: FleetWish) -> str:
    if report is None or report.wish < wish.serial:
        return "the launcher has not taken it up"
    parts = []
    for role, count in _wanted(wish):
        states = _of(report, role)
        leaving = sum(state.leaving for state in states)
        at_work = sum(state.state in SETTLED and not state.leaving for state in states)
        parts.append(f"{at_work} of {count} {role}s at work, {leaving} leaving")
    return "; ".join(parts)


def changes(before: RunReport | None, after: RunReport | None, wish: FleetWish) -> list[str]:
    """What happened, a line per kind of role: `actors: 1 → 4, started actor-1, actor-2, actor-3`."""
    lines = []
    for role, count in _wanted(wish):
        old, new = (_names(report, role) for report in (before, after))
        parts = [f"{role}s: {len(old)} → {count}"]
        if started := [name for name in new if name not in old]:
            parts.append(f"started {', '.join(started)}")
        if left := [name for name in old if name not in new]:
            parts.append(f"drained {', '.join(left)}")
        lines.append(", ".join(parts))
    return lines


def _of(report: RunReport, role: str) -> Sequence[RoleState]:
    return [state for state in report.roles if state.role == role]


def _names(report: RunReport | None, role: str) -> list[str]:
    return [state.name for state in _of(report, role) if not state.leaving] if report is not None else []
