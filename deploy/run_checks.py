"""What a configuration says that only its parts together can judge, judged before anything is started."""

from __future__ import annotations

from typing import Final

from common.config import Config
from common.data.rows import read_requests
from common.tasks import Task
from common.tasks.from_config import task_of
from deploy.errors import LaunchError

PUBMED_MOST_IDS: Final = 9_999  # that one search gives: https://www.ncbi.nlm.nih.gov/books/NBK25499/#chapter4.ESearch


def check_values(config: Config) -> None:
    """Task, reward and metrics (a user's own are imported), engine and tracking fit together.

    Raises:
        LaunchError: they do not.
    """
    from common.tracking.wandb_tracker import resolve_mode

    try:
        task = task_of(config)
        resolve_mode(config.tracking.wandb)
    except ValueError as error:
        raise LaunchError(str(error)) from None
    _check_engine(config, task)


def check_rows(config: Config) -> None:
    """The data are the task's: the first row of each split has what the task is scored by.

    config: `data.corpus` is a folder.

    Raises:
        LaunchError: it has not. DataError: it cannot be read.
    """
    task = task_of(config)
    for split in dict.fromkeys((config.data.train_split, config.data.heldout_split)):
        for row in read_requests(config.data.corpus, split)[:1]:
            try:
                task.check_row(row)
            except ValueError as error:
                raise LaunchError(f"data.corpus {config.data.corpus} ({split}): {error}") from None


def _check_engine(config: Config, task: Task) -> None:
    search = config.search
    if search.engine not in task.engines:
        fitting = " or ".join(f"search.engine={kind}" for kind in sorted(task.engines))
        raise LaunchError(f"search.engine is {search.engine}, but the task {task.name} is for {fitting}: set that")
    if search.sort == "unsorted" and search.engine != "ctgov":
        raise LaunchError(
            f"search.sort is unsorted, which {search.engine} does not have (ctgov only): set relevance or pub_date"
        )
    if search.engine == "sqlite":
        _check_sqlite(config)
    if search.engine == "pubmed" and task.top_k > PUBMED_MOST_IDS:
        raise LaunchError(
            f"search.retmax is {task.top_k}, but PubMed gives {PUBMED_MOST_IDS:,} ids per search at most: set no more"
        )
    operators = getattr(task, "retriever", "") == "bm25_boolean"
    if search.engine == "bm25" and operators and search.bm25.syntax != "boolean":
        raise LaunchError(
            "task.options.retriever is bm25_boolean, but the engine would ignore operators: set "
            "search.bm25.syntax=boolean"
        )


def _check_sqlite(config: Config) -> None:
    """SQL runs inside a rewarder: it is no search, so what bounds or keeps searches does not reach it."""
    search = config.search
    if search.cache.mode in ("record", "replay"):
        raise LaunchError(
            f"search.cache.mode is {search.cache.mode}, but SQL answers run on files at rest and are no searches: "
            "leave it at memory; the same databases give the same results"
        )
    if search.max_connections is not None:
        raise LaunchError("search.max_connections has no meaning for sqlite: set search.sql.processes")
