"""A user's own task and metric, from a file that is not ours: trained end to end, and what happens when it fails."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.tracking.metrics_log import read_metrics
from common.tracking.summary import read_summary
from tests.deploy.small_run import SMALL, SmallRun

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

OWN = '''
from pathlib import Path

from common.tasks import RewardTable
from common.tasks.publication_search import PublicationSearch


class NewestFirst(PublicationSearch):
    """Only what comes first counts."""

    name = "newest_first"
    metric = "found_early"
    measures = PublicationSearch.measures | {"found_early"}
    default_reward = RewardTable(kind="metric", metric="found_early", scale=5.0, miss=0.0)

    def measure(self, row, answer, outcome):
        early = sum(1 / rank for rank, document in enumerate(outcome.ids, start=1) if document in row.relevant)
        return super().measure(row, answer, outcome) | {"found_early": early / len(row.relevant)}


def brevity(row, answer, outcome):
    if (Path(__file__).parent / "broken").exists():
        raise RuntimeError("out of order")
    return 1 / len(answer.query.split())
'''
SETTINGS = ("task.name=my_search:NewestFirst", "task.metrics=[my_search:brevity]", "learner.steps=4")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "my_search.py").write_text(OWN)
    return tmp_path


@pytest.fixture
def run(demo_folder: Path, folder: Path) -> Iterator[SmallRun]:
    small = own_run(demo_folder, folder)
    yield small.start()
    small.end()


def own_run(demo_folder: Path, folder: Path, *options: str) -> SmallRun:
    small = SmallRun(demo_folder, "own", [*SMALL, *SETTINGS, *options])
    small.environment["PYTHONPATH"] += f"{os.pathsep}{folder}"
    return small


def test_own_code_is_trained_by_and_its_failure_ends_the_run_until_it_is_mended(
    run: SmallRun, demo_folder: Path, folder: Path
) -> None:
    run.wait_for_step(1)
    (folder / "broken").touch()
    output = run.finish(status=1)
    error = next(line for line in output.splitlines() if line.startswith("error: "))
    assert "rewarder-0 cannot go on: the task newest_first cannot score row" in error
    assert "the metric my_search:brevity failed" in error
    assert "out of order" in error
    assert "(my_search.py, line " in error
    assert "with --resume goes on" in error
    assert run.processes() == []
    assert "is started again" not in run.launcher_log()
    newest = max(path.name for path in run.folder.checkpoints.iterdir())
    assert newest.startswith(f"step-{run.step():08d}"), "what was trained is saved"

    (folder / "broken").unlink()
    again = own_run(demo_folder, folder, "--resume").start()
    try:
        assert "found_early" in again.finish()
    finally:
        again.end()
    again.assert_balanced(steps=4)
    lines = read_metrics(again.folder.metrics)
    for name in ("found_early/train", "metric/found_early", "metric/my_search:brevity", "metric/recall"):
        assert sum(line.get(name) is not None for line in lines) == 4, name
    assert all(0 < line["metric/my_search:brevity"] <= 1 for line in lines if "metric/my_search:brevity" in line)
    summary = read_summary(again.folder.summary)
    assert {"heldout_found_early_start", "heldout_found_early_trained", "heldout_found_early_or_all"} <= set(summary)
