"""The task a configuration describes; learner, rewarder and baselines all build it here and so agree."""

from __future__ import annotations

from common.config import Config
from common.tasks import Task, load_task

_RENAMED = {"recall_weight": "metric_weight"}


def task_of(config: Config) -> Task:
    """Build the task of a run.

    Raises:
        ValueError: unknown task, or a reward table that makes no sense.
    """
    given = config.task.reward.model_dump(exclude_unset=True)
    reward = {_RENAMED.get(key, key): value for key, value in given.items() if value is not None}
    if reward.get("kind") == "recall":
        reward["kind"] = "metric"
    return load_task(
        config.task.name,
        prompt=config.task.prompt,
        reasoning=config.task.reasoning,
        top_k=config.search.retmax,
        reward=reward,
    )
