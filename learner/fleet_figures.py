"""Figures of the fleet between two looks at it: idle shares, throughput, queue depths, quota."""

from __future__ import annotations

from dataclasses import dataclass

from common import messages as m


@dataclass(frozen=True)
class FleetTotals:
    """Counters of all actors added up, at one moment."""

    busy_s: float = 0.0
    alive_s: float = 0.0
    generated_tokens: float = 0.0
    stall_s: float = 0.0

    @classmethod
    def of(cls, status: m.StatusReply | None) -> FleetTotals:
        """Add up the actors of a status."""
        actors = [peer.status.counters for peer in status.peers if peer.role == "actor"] if status else []
        names = ("busy_s", "alive_s", "generated_tokens", "stall_s")
        return cls(*(sum(counters.get(name, 0.0) for counters in actors) for name in names))


class FleetFigures:
    """Differences between successive states of the fleet.

    Args:
        quota_per_s: requests per second that the quota allows, None without quota.
    """

    def __init__(self, quota_per_s: float | None) -> None:
        self._quota_per_s = quota_per_s
        self._before = FleetTotals()
        self._slots_before = 0

    def since_last(self, status: m.StatusReply | None, seconds: float) -> dict[str, float]:
        """The figures of the `seconds` since the last call. Actors that left or restarted count as idle-free."""
        if status is None:
            return {}
        now = FleetTotals.of(status)
        alive, busy = now.alive_s - self._before.alive_s, now.busy_s - self._before.busy_s
        tokens = now.generated_tokens - self._before.generated_tokens
        figures = {f"queue/{name}": float(stage.queued + stage.leased) for name, stage in status.stages.items()}
        if alive > 0 and busy >= 0 and tokens >= 0:
            figures["idle/actor"] = min(1.0, max(0.0, 1.0 - busy / alive))
            figures["tokens/generated_per_s"] = tokens / max(seconds, 1e-9)
            figures["timing/actor_stall_s"] = max(0.0, now.stall_s - self._before.stall_s)
        if self._quota_per_s is not None:
            granted = status.slots_granted - self._slots_before
            figures["quota/utilisation"] = granted / max(self._quota_per_s * seconds, 1e-9)
        self._before, self._slots_before = now, status.slots_granted
        return figures
