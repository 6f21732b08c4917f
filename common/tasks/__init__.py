"""Task families, one file each. A file that sets `TASK` to its `Task` subclass is found under the file's
name; a user's own file is named in the configuration as `my_module:MyTask`.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from typing import Any

from common.tasks.answer import ParsedAnswer, ParseFailure
from common.tasks.base import Message, Task, TaskScore
from common.tasks.outcome import Execution, Hits, Outcome
from common.tasks.own_code import is_own, load_object
from common.tasks.reward import Reward, RewardTable
from common.tasks.row import Row

__all__ = [
    "Execution",
    "Hits",
    "Message",
    "Outcome",
    "ParseFailure",
    "ParsedAnswer",
    "Reward",
    "RewardTable",
    "Row",
    "Task",
    "TaskScore",
    "load_task",
    "task_names",
]

_NOT_TASKS = frozenset(
    {"answer", "answer_pattern", "base", "from_config", "outcome", "own_code", "prompts", "reward", "row"}
)


def task_names() -> list[str]:
    """Names of our own tasks, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _NOT_TASKS)


def load_task(name: str, **options: Any) -> Task:
    """Build the task `name`, or the user's own `module:Class`, with its constructor's options.

    Raises ValueError for an unknown task (naming the closest one), an option the task does not have, or a class
    that lacks part of the interface (saying which).
    """
    task_class = _own_task(name) if is_own(name) else _task(name)
    try:
        return task_class(**options)
    except TypeError as error:
        raise ValueError(f"task {name!r}: {error}") from error


def _task(name: str) -> type[Task]:
    known = task_names()
    if name not in known:
        closest = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {closest[0]!r}?" if closest else ""
        raise ValueError(f"unknown task {name!r}: choose one of {', '.join(known)}, or module:Class{hint}")
    task_class: type[Task] = importlib.import_module(f"{__name__}.{name}").TASK
    return task_class


def _own_task(spec: str) -> type[Task]:
    task_class = load_object(spec, "task")
    if not (inspect.isclass(task_class) and issubclass(task_class, Task)):
        raise ValueError(f"task {spec!r}: it is no subclass of common.tasks.Task; write class MyTask(Task)")
    missing = [name for name in ("name", "metric") if not isinstance(getattr(task_class, name, None), str)]
    missing += [f"{name}()" for name in sorted(task_class.__abstractmethods__)]
    if missing:
        raise ValueError(f"task {spec!r} lacks {', '.join(missing)}: see docs/rewards.md for what a task needs")
    return task_class
