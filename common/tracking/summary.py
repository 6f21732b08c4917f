"""summary.json: the figures of a run by which it is judged, written in parts by whoever knows them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.tracking.jsonl import encode_line, replace_file

REQUIRED_KEYS = (
    "engine",
    "steps",
    "trained_samples",
    "heldout_recall_original",
    "heldout_recall_and_all",
    "heldout_recall_or_all",
    "heldout_recall_rarest",
    "heldout_recall_start",
    "heldout_recall_trained",
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


def missing_keys(summary: Mapping[str, object]) -> list[str]:
    """The required keys that `summary` lacks."""
    return [key for key in REQUIRED_KEYS if key not in summary]
