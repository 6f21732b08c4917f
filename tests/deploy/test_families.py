"""Every task family through the real launcher, each with its own engine, on its generated world."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from common.tracking.samples_log import read_samples
from common.tracking.summary import read_summary
from tests.deploy.small_run import SmallRun

STEPS, GROUPS_PER_STEP = 2, 4
# Two steps show that everything fits together; what can be learned is shown by the demo's own test.
TINY = (
    "actor.engine=transformers",
    "model.warm_start.width=64",
    "model.warm_start.heads=2",
    "model.warm_start.steps=100",
    "model.warm_start.minutes=5",
    "algorithm.filter_zero_variance=false",
    f"learner.steps={STEPS}",
    f"learner.groups_per_step={GROUPS_PER_STEP}",
    "learner.eval_every=0",
    "data.heldout_limit=8",
)

pytestmark = pytest.mark.slow


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("config", "metrics", "package"),
    [
        ("demo_sql.yaml", ("accuracy", "executed"), "sqlite3"),
        ("demo_trials.yaml", ("recall", "precision"), "aiohttp"),
        ("demo_evidence.yaml", ("hits@20", "mrr"), "pyserini"),
        ("demo_ranking.yaml", ("ndcg@10", "recall@50"), "pyserini"),
        ("demo_ranking_dense.yaml", ("ndcg@10", "recall@50"), "faiss"),
    ],
)
def test_a_family_trains_end_to_end(demo_folder: Path, config: str, metrics: tuple[str, ...], package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    small = SmallRun(demo_folder, Path(config).stem, TINY, config=config)
    try:
        small.start().finish()
    finally:
        small.end()
    small.assert_balanced(steps=STEPS, groups_per_step=GROUPS_PER_STEP)
    lines = [json.loads(line) for line in small.folder.metrics.read_text().splitlines()]
    trained = [line for line in lines if "loss/loss" in line]
    assert len(trained) == STEPS
    for name in metrics:  # measured of scored answers only: malformed ones have none
        assert any(f"metric/{name}" in line for line in trained), (name, sorted(trained[-1]))
    assert [sample for sample in read_samples(small.folder.samples) if sample.get("query")]
    assert read_summary(small.folder.summary)["heldout_metric"] == metrics[0]
    for log in small.folder.logs.glob("*.log"):
        assert "Traceback" not in log.read_text(), log
