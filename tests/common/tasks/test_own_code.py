from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.tasks import Hits, ParsedAnswer, Row, load_task

ROW = Row("q1", "a request", relevant=("1", "2"))
ANSWER = ParsedAnswer("", "a query")
HITS = Hits(("1", "9"), 2)

OWN = """
from common.metrics.ranking import ndcg
from common.tasks import RewardTable, Task


class PatentSearch(Task):
    name = "patent_search"
    metric = "ndcg@20"
    role = "You search patents."
    default_reward = RewardTable(kind="metric", metric="ndcg@20", scale=5.0)

    def measure(self, row, answer, outcome):
        return {"ndcg@20": ndcg(outcome.ids, row.judgments, 20)}


class NoMeasure(Task):
    name = "no_measure"
    metric = "recall"


class NoName(Task):
    def measure(self, row, answer, outcome):
        return {}


class NoTask:
    pass


def coverage(row, answer, outcome):
    return len(outcome.ids) / 100 + len(answer.query)


def broken(row, answer, outcome):
    return row.relevnt


def infinite(row, answer, outcome):
    return float("inf")


def text(row, answer, outcome):
    return "much"


def two_arguments(row, outcome):
    return 0.0


async def waiting(row, answer, outcome):
    return 0.0
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Name of a module of the user's in the working directory, which is not on sys.path."""
    name = f"own_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(OWN)
    (tmp_path / f"{name}_syntax.py").write_text("def broken(:\n")
    (tmp_path / f"{name}_needs.py").write_text("import a_package_nobody_has\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    yield name
    for module in [module for module in sys.modules if module.startswith(name)]:
        del sys.modules[module]


def test_a_users_own_task(own: str) -> None:
    task = load_task(f"{own}:PatentSearch", reasoning=False, top_k=20, metrics=["recall@1"])
    score = task.score(ROW, ANSWER, HITS)
    assert score.metrics["ndcg@20"] == pytest.approx(1 / (1 + 1 / 1.584962500721156))
    assert score.metrics["recall@1"] == 0.5
    assert score.reward == pytest.approx(1.0 + 5.0 * score.metrics["ndcg@20"])
    system, user = task.messages(ROW)
    assert system["content"].startswith("You search patents.")
    assert "a request" in user["content"]
    assert task.parse('<answer>{"query": "a query"}</answer>') == ANSWER


@pytest.mark.parametrize(
    ("class_name", "message"),
    [
        ("NoMeasure", r"lacks measure\(\)"),
        ("NoName", "lacks name, metric"),
        ("NoTask", "no subclass of common.tasks.Task"),
        ("coverage", "no subclass of common.tasks.Task"),
        ("PatentSerch", "did you mean 'PatentSearch'"),
        ("", "module:name"),
        ("Patent.Search", "module:name"),
    ],
)
def test_what_a_task_lacks_is_said(own: str, class_name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_task(f"{own}:{class_name}")


def test_a_module_that_cannot_be_imported(own: str) -> None:
    with pytest.raises(ValueError, match=r"no module 'nowhere_at_all'.*PYTHONPATH"):
        load_task("nowhere_at_all:MyTask")
    with pytest.raises(ValueError, match="a_package_nobody_has"):
        load_task(f"{own}_needs:MyTask")
    with pytest.raises(ValueError, match=r"importing .* failed: SyntaxError"):
        load_task(f"{own}_syntax:MyTask")


def test_an_option_the_task_does_not_have(own: str) -> None:
    with pytest.raises(ValueError, match="colour"):
        load_task(f"{own}:PatentSearch", colour="red")


def test_a_users_own_metric_is_measured_and_can_be_the_reward(own: str) -> None:
    spec = f"{own}:coverage"
    watched = load_task("publication_search", metrics=[spec]).score(ROW, ANSWER, HITS)
    assert watched.metrics[spec] == 0.02 + 7
    assert watched.reward == 5.0
    rewarded = load_task("publication_search", reward={"kind": "metric", "metric": spec, "scale": 2.0})
    score = rewarded.score(ROW, ANSWER, HITS)
    assert score.metrics[spec] == 7.02
    assert score.reward == 1.0 + 2.0 * 7.02
    mixed = load_task("publication_search", reward={"metric": spec, "tiers": [(9.0, 3.0), (7.0, 2.0)]})
    assert mixed.score(ROW, ANSWER, HITS).reward == 3.0


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("two_arguments", "must take"),
        ("waiting", "async"),
        ("NoTask", "no function"),
        ("coverge", "did you mean 'coverage'"),
    ],
)
def test_what_is_no_metric_is_refused_at_once(own: str, function: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_task("publication_search", metrics=[f"{own}:{function}"])


@pytest.mark.parametrize(
    ("function", "message"),
    [("broken", "relevnt"), ("infinite", "gave inf for row 'q1'"), ("text", "gave 'much'")],
)
def test_a_metric_that_fails_never_becomes_a_number(own: str, function: str, message: str) -> None:
    task = load_task("publication_search", metrics=[f"{own}:{function}"])
    with pytest.raises(ValueError, match=message):
        task.score(ROW, ANSWER, HITS)


def test_the_examples_in_the_documentation_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[3] / "docs" / "rewards.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n# (\w+)\.py\n(.*?)```", page, re.DOTALL)
    assert [name for name, _ in blocks] == ["my_metrics", "my_task"]
    for name, code in blocks:
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    own_reward = {"kind": "metric", "metric": "my_metrics:short_and_found"}
    assert load_task("publication_search", reward=own_reward).score(ROW, ANSWER, HITS).reward > 1.0
    assert load_task("my_task:PatentSearch").score(ROW, ANSWER, HITS).reward > 1.0
    for name, _ in blocks:
        monkeypatch.delitem(sys.modules, name)
