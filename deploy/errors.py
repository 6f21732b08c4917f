"""Which errors are the user's to mend: they are shown as one line, everything else with its traceback."""

from __future__ import annotations

import errno
import importlib

from deploy.restarts import HOPELESS


class LaunchError(Exception):
    """A run cannot start or go on; the message is one line that says what to do."""


# Named by path, because importing a role only to know its errors would load torch.
_USER_ERRORS = (
    "common.config.loading.ConfigError",
    "common.data.beir.DataError",
    "common.transport.keys.KeyFileError",
    "common.transport.client.BrokerUnreachableError",
    "rewarders.engines.base.EngineUnavailable",
    "rewarders.errors.FatalScoringError",
    "rewarders.servers.hosting.SearchServerError",
    "actors.engine.EngineError",
    "learner.checkpoint.CheckpointError",
    "learner.loop.SupersededError",
    "deploy.errors.LaunchError",
    "deploy.rewriting.rewriter.NotPossible",
)
# Extra of this package that brings a module.
_EXTRAS = {
    "torch": "learner",
    "transformers": "learner",
    "vllm": "vllm",
    "wandb": "tracking",
    "pyserini": "lucene",
    "faiss": "dense",
    "pyarrow": "data",
    "huggingface_hub": "data",
    "trl": "sft",
    "fastapi": "serve",
    "uvicorn": "serve",
    "prometheus_client": "serve",
    "datasets": "sft",
    "accelerate": "sft",
}


# Of these, every process of a role would end in the same way.
_HOPELESS_ERRORS = ("rewarders.errors.FatalScoringError",)


def exit_status(error: BaseException) -> int:
    """Of a process that ends by an error the user can mend."""
    return HOPELESS if _is_one_of(error, _HOPELESS_ERRORS) else 1


def user_message(error: BaseException) -> str | None:
    """One line for an error the user can mend, None for a fault of ours."""
    if _is_one_of(error, _USER_ERRORS):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left on the disk of {error.filename or 'the run folder'}: free some, then go on with --resume"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.EADDRINUSE, errno.ENOENT):
        return f"{error.filename or ''}: {error.strerror}".removeprefix(": ")
    if isinstance(error, ModuleNotFoundError):
        extra = _EXTRAS.get(error.name or "")
        hint = f"pip install 'deepretrieval-async[{extra}]'" if extra else f"pip install {error.name}"
        return f"the package {error.name!r} is not installed: {hint}; `deepretrieval doctor` shows what else is missing"
    return None


def _is_one_of(error: BaseException, paths: tuple[str, ...]) -> bool:
    return any(f"{cls.__module__}.{cls.__qualname__}" in paths for cls in type(error).__mro__)


def load_user_errors() -> list[type[BaseException]]:
    """The classes themselves (for tests: every name must exist)."""
    classes = []
    for path in _USER_ERRORS:
        module, _, name = path.rpartition(".")
        classes.append(getattr(importlib.import_module(module), name))
    return classes
