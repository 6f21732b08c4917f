from __future__ import annotations

import pytest

from common.config import Config, load_config, to_yaml
from common.tasks import Hits, ParsedAnswer, Row, load_task, task_names
from common.tasks.from_config import task_of

ROW = Row("q1", "a request", relevant=("1", "2"))


def config(**sections: object) -> Config:
    return Config.model_validate(sections)


@pytest.mark.parametrize("name", task_names())
def test_an_empty_section_leaves_every_task_its_own_reward(name: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    task = task_of(config(task={"name": name}))
    assert task.reward == load_task(name).reward
    assert task.top_k == load_task(name).top_k
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(to_yaml(config(task={"name": name})))
    assert task_of(load_config(resolved)).reward == task.reward


def test_what_is_set_is_changed_and_nothing_else() -> None:
    task = task_of(
        config(
            task={
                "name": "ranking",
                "strict": False,
                "metrics": ["mrr"],
                "options": {"dataset": "scifact", "retriever": "dense"},
                "reward": {"scale": 2.0, "costs": {"query_words": {"free": 1, "each": 0.5}}},
            },
            search={"retmax": 20},
        )
    )
    assert (task.top_k, task.strict, task.engines) == (20, False, {"dense"})
    score = task.score(ROW, ParsedAnswer("", "two words"), Hits(("1", "2"), 2))
    assert score.reward == pytest.approx(0.1 + 2.0 - 0.5)
    assert score.metrics["mrr"] == 1.0


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"name": "rankin"}, "did you mean 'ranking'"),
        ({"options": {"colour": "red"}}, "colour"),
        ({"options": {"reasoning": False}}, "a key of its own"),
        ({"reward": {"metric": "recal"}}, "recal"),
        ({"reward": {"costs": {"query_words": {"free": 1}}}}, "each"),
    ],
)
def test_what_makes_no_sense_is_refused(task: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task_of(config(task=task))
