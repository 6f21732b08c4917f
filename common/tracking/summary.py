"""summary.json: the figures of a run by which it is judged, written in parts by whoever knows them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.tracking.jsonl import encode_line, replace_file

BASELINES = ("original", "and_all", "or_all", "rarest")


def heldout_figure(metric: str, of: str) -> str:
    """The key of the mean of a task's metric over the held-out requests.

    of: "start", "trained" (the policy then), or a baseline.
    """
    return f"heldout_{metric}_{of}"


REQUIRED_KEYS = (
    "engine",
    "steps",
    "trained_samples",
    *(heldout_figure("recall", of) for of in (*BASELINES, "start", "trained")),
    "heldout_ci95",
    "dropped_stale",
    "max_staleness_seen",
    "learner_idle",
    "actor_idle",
    "wall_s",
)


def read_summary(path: str | Path) -> dict[str, Any]:
    """The summary, or an empty dict where there is none. Raises ValueError where it is not a JSON object."""
    try:
        summary = json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); delete it and write the report again") from error
    if not isinstance(summary, dict):
        raise ValueError(f"{path}: not a JSON object; delete it and write the report again")
    return summary


def update_summary(path: str | Path, fields: Mapping[str, object]) -> dict[str, Any]:
    """Merge `fields` into summary.json, replaced in one step, required keys first. Returns all of it."""
    merged: dict[str, Any] = read_summary(path) | json.loads(encode_line(fields))
    known = {key: merged[key] for key in REQUIRED_KEYS if key in merged}
    ordered = known | merged
    replace_file(path, json.dumps(ordered, indent=2, ensure_ascii=False).encode() + b"\n")
    return ordered


def required_keys(metric: str) -> tuple[str, ...]:
    """The keys a run must have whose task reports `metric`; not every engine has baselines with another than recall."""
    if metric == "recall":
        return REQUIRED_KEYS
    baselines = {heldout_figure("recall", of) for of in BASELINES}
    return tuple(key.replace("_recall_", f"_{metric}_") for key in REQUIRED_KEYS if key not in baselines)


def missing_keys(summary: Mapping[str, object], metric: str = "recall") -> list[str]:
    """The required keys that `summary` lacks."""
    return [key for key in required_keys(metric) if key not in summary]
