"""A user's own metric, from the function named in the config to what W&B is sent."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path

import pytest

from common import messages as m
from common.config import Config
from common.scores import Scored
from common.tasks import Hits, ParsedAnswer, Row
from common.tasks.from_config import task_of
from common.tracking.tracker import Tracker
from common.tracking.wandb_tracker import WandbOptions, run_id
from learner.step_record import describe_groups
from tests.common.broker_world import rollout, ticket
from tests.wandb_files import wandb_records

OWN = "def words(row, answer, outcome):\n    return float(len(answer.query.split()))\n"
ROW = Row("q1", "a request", relevant=("1", "2"))


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_an_own_metric_is_in_what_wandb_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setattr("common.tracking.tracker.WandbOptions", partial(WandbOptions, finish_timeout_s=120.0))
    (tmp_path / "my_words.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    task = task_of(Config.model_validate({"task": {"metrics": ["my_words:words"]}}))
    answers = [ParsedAnswer("", "one"), ParsedAnswer("", "one AND two")]
    grades = [task.score(ROW, answer, Hits(("1", "9"), 2)) for answer in answers]
    scores = tuple(Scored(grade.reward, grade.metrics, "q", 2) for grade in grades)
    group = m.ScoredGroup(ticket(1), rollout(1), m.GroupScores(1, "r", scores))

    warnings: list[str] = []
    tracker = Tracker(tmp_path, name="own", config={}, wandb_mode="offline", warn=warnings.append)
    tracker.log(1, describe_groups([group], 0, task.metric))
    tracker.finish({})
    assert warnings == []
    (record,) = (tmp_path / "wandb").glob(f"offline-run-*-{run_id(tmp_path)}/*.wandb")
    (sent,) = wandb_records(record)["history"]
    assert sent["metric/my_words:words"] == 2.0
    assert sent["recall/train"] == 0.5
