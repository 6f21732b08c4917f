"""Code of the user that a configuration names as `module:name`: a task, a metric, a reward."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any


def is_own(spec: str) -> bool:
    """Whether a name in the configuration means the user's own code."""
    return ":" in spec


def load_object(spec: str, what: str) -> Any:
    """The object `module:name`, from the working directory or anything else Python imports from.

    what: names it in messages ("task", "metric"). Raises ValueError that says which part is wrong.
    """
    module_name, _, name = spec.partition(":")
    if not (module_name and name.isidentifier() and all(part.isidentifier() for part in module_name.split("."))):
        raise ValueError(f"{what} {spec!r}: write it as module:name, e.g. my_module:MyTask")
    module = _import(module_name, f"{what} {spec!r}")
    if not hasattr(module, name):
        close = difflib.get_close_matches(name, dir(module), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{what} {spec!r}: {module_name} ({module.__file__}) has no {name!r}{hint}")
    return getattr(module, name)


def load_function(spec: str, what: str) -> Callable[..., Any]:
    """The function `module:name` of three arguments: row, answer, outcome. Raises ValueError."""
    function = load_object(spec, what)
    if not callable(function) or inspect.isclass(function):
        raise ValueError(
            f"{what} {spec!r}: it is no function; write def {spec.partition(':')[2]}(row, answer, outcome)"
        )
    if inspect.iscoroutinefunction(function):
        raise ValueError(f"{what} {spec!r}: it is async; write a plain function, it may not wait for anything")
    try:
        inspect.signature(function).bind("row", "answer", "outcome")
    except TypeError as error:
        raise ValueError(f"{what} {spec!r}: it must take (row, answer, outcome): {error}") from None
    except ValueError:  # a function in C without a signature: the first call will tell
        pass
    return function


def _import(module_name: str, described: str) -> Any:
    folder = os.getcwd()
    if folder not in sys.path:  # console scripts do not have it; last, so that it hides no installed module
        sys.path.append(folder)
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(
                f"{described}: there is no module {error.name!r} in {folder} or on PYTHONPATH: "
                "start the run where the file lies, or set PYTHONPATH"
            ) from None
        raise ValueError(f"{described}: {module_name} needs a module that is not installed: {error.name}") from error
    except Exception as error:  # the user's file may raise anything while it is imported
        raise ValueError(f"{described}: importing {module_name} failed: {type(error).__name__}: {error}") from error
