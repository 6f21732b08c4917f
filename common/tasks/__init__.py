"""Task families, one file each. A file that sets `TASK` to its `Task` subclass is found under the file's
name.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from typing import Any

from common.tasks.answer import ParsedAnswer, ParseFailure
from common.tasks.base import Message, Task, TaskRow, TaskScore

__all__ = [
    "Message",
    "ParseFailure",
    "ParsedAnswer",
    "Task",
    "TaskRow",
    "TaskScore",
    "load_task",
    "task_names",
]

_NOT_TASKS = frozenset({"answer", "base", "from_config"})


def task_names() -> list[str]:
    """Names that `load_task` accepts, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _NOT_TASKS)


def load_task(name: str, **options: Any) -> Task:
    """Build the task `name` with its constructor's options.

    Raises ValueError for an unknown task (naming the closest one) or an option the task does not have.
    """
    known = task_names()
    if name not in known:
        closest = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {closest[0]!r}?" if closest else ""
        raise ValueError(f"unknown task {name!r}: choose one of {', '.join(known)}{hint}")
    task_class: type[Task] = importlib.import_module(f"{__name__}.{name}").TASK
    try:
        return task_class(**options)
    except TypeError as error:
        raise ValueError(f"task {name!r}: {error}") from error
