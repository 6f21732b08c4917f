"""How the processes of a run are doing, in the words of the progress display."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common.messages import PeerEntry, StatusReply
from deploy.processes import RoleProcess

STALLED_AFTER_S = 30.0  # without progress while waiting for something
SILENT_AFTER_S = 15.0  # without a heartbeat


def role_states(processes: Sequence[RoleProcess], fleet: StatusReply | None) -> list[dict[str, Any]]:
    """One snapshot per process: name, state, phase, waits_for, since_s."""
    peers = {peer.name: peer for peer in fleet.peers} if fleet else {}
    return [_state(process, peers.get(process.name)) for process in processes]


def _state(process: RoleProcess, peer: PeerEntry | None) -> dict[str, Any]:
    state: dict[str, Any] = {"name": process.name}
    if process.returncode is not None:
        return state | {"state": "stopped" if process.returncode in (0, 130) else "dead"}
    if peer is None:
        talks = process.name not in ("broker", "search-server")
        return state | {"state": "starting" if talks else "running"}
    status = peer.status
    stalled = status.progress_age_s > STALLED_AFTER_S and bool(status.waits_for)
    silent = peer.silent_s > SILENT_AFTER_S
    return state | {
        "state": "stalled" if stalled or silent else "running",
        "phase": status.phase,
        "waits_for": "a sign of life" if silent else status.waits_for,
        "since_s": peer.silent_s if silent else status.progress_age_s,
    }
