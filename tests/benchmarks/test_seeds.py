"""How the seeds of two configs are compared."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.seeds import difference, name_of, values_per_request
from common.run_folder import RunFolder
from common.tracking.heldout import HeldoutResult, HeldoutRow, write_heldout


def write_run(config: str, seed: int, values: dict[str, float]) -> None:
    folder = RunFolder(Path("runs") / name_of(config, seed)).heldout
    folder.mkdir(parents=True)
    rows = [HeldoutRow(request, "request", "", "q", value) for request, value in values.items()]
    write_heldout(folder / "trained.json", HeldoutResult(9, rows))


def test_requests_are_paired_by_their_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_run("configs/ours.yaml", 0, {"a": 0.5, "b": 1.0, "c": 0.0})
    write_run("configs/ours.yaml", 1, {"c": 0.5, "a": 1.0, "b": 1.0})
    write_run("configs/other.yaml", 0, {"b": 0.75, "c": 0.0, "a": 0.5})
    write_run("configs/other.yaml", 1, {"a": 0.5, "b": 0.75, "c": 0.0})
    assert values_per_request("configs/ours.yaml", [0, 1]) == [0.75, 1.0, 0.25]
    # Each request is a quarter better, so resampling them changes nothing.
    assert difference("configs/ours.yaml", "configs/other.yaml", [0, 1]) == {"mean": 0.25, "ci95": [0.25, 0.25]}
