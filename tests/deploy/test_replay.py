"""A run that was recorded, repeated without its search server: the same weights, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.run_folder import RunFolder
from common.tracking.summary import read_summary
from rewarders.cache.table import SearchTable
from tests.deploy.small_run import SMALL, SmallRun

STEPS = 3
SETTINGS = (
    *SMALL,
    "actor.count=1",
    "rewarder.count=2",
    "sampling.max_tokens=24",
    "data.heldout_limit=4",
    "learner.max_staleness=0",
    f"learner.steps={STEPS}",
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def searches(folder: RunFolder) -> int:
    """Queries in the recording of a run on one host."""
    [path] = folder.searches.glob("*.sqlite")
    table = SearchTable(path, read_only=True)
    table.open()
    try:
        return table.rows
    finally:
        table.close()


def test_a_recorded_run_is_repeated_exactly_and_another_is_not_made_up(demo_folder: Path) -> None:
    recorded = SmallRun(demo_folder, "recorded", (*SETTINGS, "search.cache.mode=record"))
    replaying = ("search.cache.mode=replay", f"search.cache.folder={recorded.folder.searches}")
    replayed = SmallRun(demo_folder, "replayed", (*SETTINGS, *replaying))
    other = SmallRun(demo_folder, "other", (*SETTINGS, *replaying, "run.seed=99"))
    try:
        recorded.start().finish()
        known = searches(recorded.folder)
        assert known > STEPS
        replayed.start().finish()
        assert (recorded.folder.logs / "search-server.log").exists()
        assert not (replayed.folder.logs / "search-server.log").exists(), "nobody is asked"
        assert replayed.fingerprint(STEPS) == recorded.fingerprint(STEPS)
        assert searches(recorded.folder) == known
        recalls = [read_summary(run.folder.summary)["heldout_recall_trained"] for run in (recorded, replayed)]
        assert recalls[0] == recalls[1]
        output = other.start().finish(status=1)
        assert "has no answer to the query" in output
    finally:
        for run in (recorded, replayed, other):
            run.end()
