"""What the live display shows, computed from metrics and status snapshots without touching a terminal."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from common.tracking.heldout import RECALL, heldout_key
from common.tracking.metrics_log import Metrics, series

_RECENT_STEPS = 20
_BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class RoleStatus:
    """One process of the run.

    Attributes:
        name: `learner`, `actor-0`, ...
        state: `starting`, `running`, `stalled`, `silent`, `stopped` or `dead`.
        phase: what it does just now, in words (`building model`, `loading weights of version 12`).
        fraction: share of the phase that is done, 0 to 1; None where it is not known.
        waits_for: what it waits for.
        since_s: seconds in this state.
    """

    name: str
    state: str = "running"
    phase: str = ""
    fraction: float | None = None
    waits_for: str = ""
    since_s: float | None = None

    @classmethod
    def from_snapshot(cls, snapshot: Mapping[str, Any]) -> RoleStatus:
        """Read a role from a status snapshot; entries that are missing keep their defaults."""
        fraction, since = snapshot.get("fraction"), snapshot.get("since_s")
        return cls(
            name=str(snapshot.get("name", "?")),
            state=str(snapshot.get("state", "running")),
            phase=str(snapshot.get("phase") or ""),
            fraction=None if fraction is None else min(1.0, max(0.0, float(fraction))),
            waits_for=str(snapshot.get("waits_for") or ""),
            since_s=None if since is None else float(since),
        )


@dataclass(frozen=True)
class ProgressState:
    """Everything on the screen at one moment.

    Attributes:
        run, engine, device: names.
        step, steps: policy updates done, and of the whole run (0: not known yet).
        elapsed_s, eta_s: seconds since the start, and to the end (None: not known yet).
        metric: what the task reports.
        reward, heldout: (step, value) points; the metric on held-out requests only exists at evaluations.
        baselines: the same of the fixed baselines by name.
        latest: the newest value of every metric.
        roles: the processes of the run.
        warning: the last warning, or "".
    """

    run: str = ""
    engine: str = ""
    device: str = ""
    step: int = 0
    steps: int = 0
    elapsed_s: float = 0.0
    eta_s: float | None = None
    metric: str = RECALL
    reward: tuple[tuple[int, float], ...] = ()
    heldout: tuple[tuple[int, float], ...] = ()
    baselines: Mapping[str, float] = field(default_factory=dict)
    latest: Mapping[str, Any] = field(default_factory=dict)
    roles: tuple[RoleStatus, ...] = ()
    warning: str = ""

    @property
    def started(self) -> bool:
        """Whether the first step is done."""
        return self.step > 0


def build_state(metrics: Sequence[Metrics], status: Mapping[str, Any], elapsed_s: float) -> ProgressState:
    """The state of the display.

    Args:
        metrics: lines of metrics.jsonl, one per step.
        status: the newest snapshot of the run, any of the keys `run, engine, device, steps, metric, baselines,
            roles, warning`, and live metrics (`queue/score`, ...) under `live`, which win over the last step's.
        elapsed_s: seconds since the run started.
    """
    lines = list(metrics)
    latest: dict[str, Any] = {}
    for line in lines[-_RECENT_STEPS:]:
        latest.update({name: value for name, value in line.items() if value is not None})
    latest.update(status.get("live") or {})
    metric = str(status.get("metric") or RECALL)
    step, steps = int(latest.get("step", 0)), int(status.get("steps") or 0)
    return ProgressState(
        run=str(status.get("run") or ""),
        engine=str(status.get("engine") or ""),
        device=str(status.get("device") or ""),
        step=step,
        steps=steps,
        elapsed_s=elapsed_s,
        eta_s=remaining_seconds(lines, step, steps),
        metric=metric,
        reward=tuple(series(lines, "reward/mean")),
        heldout=tuple(series(lines, heldout_key(metric))),
        baselines={str(name): float(value) for name, value in (status.get("baselines") or {}).items()},
        latest=latest,
        roles=tuple(RoleStatus.from_snapshot(role) for role in status.get("roles") or ()),
        warning=str(status.get("warning") or ""),
    )


def remaining_seconds(metrics: Sequence[Metrics], step: int, steps: int) -> float | None:
    """Seconds to the end at the mean pace of the last steps; None before the first step."""
    durations = [value for _, value in series(metrics[-_RECENT_STEPS:], "timing/step_s")]
    if not durations or steps <= 0:
        return None
    return max(0, steps - step) * statistics.fmean(durations)


def sparkline(values: Sequence[float], width: int, low: float | None = None, high: float | None = None) -> str:
    """`values` as at most `width` block characters, neighbours averaged where there are more.

    `low` and `high` fix the scale; by default it is the range of the values shown.
    """
    if not values or width <= 0:
        return ""
    count = min(width, len(values))
    edges = [index * len(values) // count for index in range(count + 1)]
    means = [statistics.fmean(values[start:end]) for start, end in itertools.pairwise(edges)]
    bottom = min(means) if low is None else low
    top = max(means) if high is None else high
    if top <= bottom:
        return _BLOCKS[len(_BLOCKS) // 2] * count
    scaled = ((value - bottom) / (top - bottom) * (len(_BLOCKS) - 1) for value in means)
    return "".join(_BLOCKS[round(min(max(level, 0), len(_BLOCKS) - 1))] for level in scaled)


def duration(seconds: float | None) -> str:
    """Seconds as `42s`, `3m05s` or `2h07m`; `–` for None."""
    if seconds is None:
        return "–"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def quantity(value: float | None) -> str:
    """A count in three digits: `87`, `4.2k`, `1.3M`; `–` for None."""
    if value is None:
        return "–"
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.3g}"


def share(value: float | None) -> str:
    """A share as a whole percentage; `–` for None."""
    return "–" if value is None else f"{100 * value:.0f} %"


def figure(value: float | None, digits: int = 3) -> str:
    """A number with fixed digits; `–` for None."""
    return "–" if value is None else f"{value:.{digits}f}"
