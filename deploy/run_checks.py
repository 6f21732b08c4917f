"""What a configuration says that only its parts together can judge, judged before anything is started."""

from __future__ import annotations

import os
from typing import Final
from urllib.parse import urlsplit

from common.config import Config
from common.data.rows import read_requests
from common.tasks import Task
from common.tasks.from_config import task_of
from deploy.errors import LaunchError

NCBI_HOSTS: Final = ("eutils.ncbi.nlm.nih.gov",)
KEYLESS_PER_S: Final = 3  # https://www.ncbi.nlm.nih.gov/books/NBK25497/
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


def check_manners(config: Config) -> None:
    """What NCBI asks of those who use its service: an address, a quota, and a key for more than 3 requests a second.

    Raises:
        LaunchError: one of them is missing.
    """
    search = config.search
    if search.engine != "pubmed" or urlsplit(search.url or "").hostname not in NCBI_HOSTS:
        return
    if not search.email:
        raise LaunchError("search.email is not set: NCBI writes to it before it blocks an address; set it to yours")
    if search.quota is None:
        raise LaunchError("search.quota is not set: NCBI allows 10 requests per second: search.quota.requests=10")
    if search.quota.requests > KEYLESS_PER_S * search.quota.window_s and not os.environ.get(search.api_key_env):
        raise LaunchError(
            f"NCBI allows more than {KEYLESS_PER_S} requests per second to those with a key only: export "
            f"{search.api_key_env or 'NCBI_API_KEY'}, or set search.quota.requests={KEYLESS_PER_S}"
        )


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
