"""The task a configuration describes; learner, rewarder and baselines all build it here and so agree."""

from __future__ import annotations

from typing import Any

from common.config import Config, ConfigError
from common.tasks import Task, load_task


def task_of(config: Config) -> Task:
    """Build the task of a run.

    Raises:
        ConfigError: unknown task or option, a reward table that makes no sense, or own code that is not there.
    """
    try:
        return _task_of(config)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _task_of(config: Config) -> Task:
    task = config.task
    options: dict[str, Any] = {
        "prompt": task.prompt,
        "reasoning": task.reasoning,
        "strict": task.strict,
        "metrics": task.metrics,
        "reward": {key: value for key, value in task.reward.model_dump().items() if value is not None},
    }
    if config.search.retmax is not None:
        options["top_k"] = config.search.retmax
    twice = sorted(set(options) & set(task.options))
    if twice:
        raise ValueError(f"task.options.{twice[0]}: this has a key of its own, set it there")
    return load_task(task.name, **options, **task.options)
