"""A small model, served in a process of its own."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from benchmarks import served_model
from benchmarks.served_model import Served

__all__ = ["Served", "served"]

SETTINGS = ("task.prompt=short", "sampling.max_tokens=24", "actor.max_model_len=256")


def served(model: Path, corpus: Path, log: Path, *words: str, key: str = "") -> AbstractContextManager[Served]:
    """Serve it until the block ends; raises where it does not start."""
    return served_model.served(log, "--model", str(model), "--corpus", str(corpus), *SETTINGS, *words, key=key)
