"""A scorer over a search engine, in one call."""

from __future__ import annotations

from typing import Any

from common.tasks import Task
from rewarders.answerers.search import SearchAnswerer
from rewarders.engines.base import SearchEngine
from rewarders.scoring import Scorer


def search_scorer(task: Task, engine: SearchEngine, **options: Any) -> Scorer:
    """`options` as for `SearchAnswerer`."""
    return Scorer(task, SearchAnswerer(task, engine, **options))
