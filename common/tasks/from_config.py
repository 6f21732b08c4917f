"""The task a configuration describes; learner, rewarder and baselines all build it here and so agree."""

from __future__ import annotations

from common.config import Config
from common.tasks import Task, load_task
from common.tasks.publication_search import RewardTable


def task_of(config: Config) -> Task:
    """Build the task of a run.

    Raises:
        ValueError: unknown task, or a reward table that makes no sense.
    """
    reward = RewardTable(**config.task.reward.model_dump())
    return load_task(
        config.task.name,
        prompt=config.task.prompt,
        reasoning=config.task.reasoning,
        top_k=config.search.retmax,
        reward=reward,
    )
