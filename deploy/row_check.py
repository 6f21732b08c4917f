"""Rows that can never be scored, found before a run starts: it would wait for them for ever.

Every row must have what its task is scored by; of SQL rows the reference query is run, once each.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec
from rich.console import Console

from common.config import Config, load_config
from common.data.rows import requests_of
from common.tasks import Row
from common.tasks.from_config import task_of
from common.tasks.text_to_sql import TextToSql
from deploy.assets import cache_folder
from deploy.engines import sql_answerer_of
from deploy.errors import LaunchError
from deploy.run_setup import run_folder
from deploy.terminal import progress_bar

logger = logging.getLogger(__name__)

Report = Callable[[float, str], None]

_ATTEMPTS: Final = 3  # of a reference query that could not be run: this machine may be busy
_NAMED: Final = 5
_FORMAT: Final = 1  # part of the key under which results are kept


def without_unusable_rows(config: Config, resume: bool, console: Console) -> Config:
    """The config with the rows that can never be scored in `data.exclude`; the console names them.

    A run that goes on keeps the rows it began with, or its positions would mean other prompts.

    Raises:
        LaunchError: no row is left.
    """
    earlier = run_folder(config).config
    if resume and earlier.is_file():
        excluded = load_config(earlier).data.exclude
        return _excluding(config, excluded)
    found = unusable_rows(config)
    if not found:
        return config
    left = _excluding(config, tuple(found))
    for split in (config.data.train_split, config.data.heldout_split):
        if not requests_of(left.data, split):
            first = next(iter(found.values()))
            raise LaunchError(f"no row of the split {split} can be scored; the first reason: {first}")
    for line in _lines(found):
        console.print(line, style="yellow", highlight=False, soft_wrap=True)
    return left


def unusable_rows(config: Config) -> dict[str, str]:
    """Id -> reason of the rows of both splits that can never be scored; `data.corpus` is a folder here.

    Raises:
        EngineUnavailable: SQL cannot be run here at all.
    """
    task = task_of(config)
    rows = {
        row.id: row
        for split in (config.data.train_split, config.data.heldout_split)
        for row in requests_of(config.data, split)
    }
    found: dict[str, str] = {}
    for row in rows.values():
        try:
            task.check_row(row)
        except ValueError as error:
            found[row.id] = str(error)
    if config.search.engine == "sqlite" and isinstance(task, TextToSql):
        found |= _bad_golds(config, task, [row for row in rows.values() if row.id not in found])
    return found


def _excluding(config: Config, rows: Sequence[str]) -> Config:
    excluded = tuple(dict.fromkeys([*config.data.exclude, *rows]))
    return config.model_copy(update={"data": config.data.model_copy(update={"exclude": excluded})})


def _lines(found: Mapping[str, str]) -> list[str]:
    named = [f"  {row}: {reason}" for row, reason in list(found.items())[:_NAMED]]
    more = [f"  and {len(found) - _NAMED} more: see data.exclude in config.yaml"] if len(found) > _NAMED else []
    return [f"{len(found)} rows can never be scored and are left out:", *named, *more]


# ---------------------------------------------------------------------- SQL


def _bad_golds(config: Config, task: TextToSql, rows: Sequence[Row]) -> dict[str, str]:
    """As found before for the same rows and databases, or by running every reference query."""
    kept = cache_folder() / "checks" / f"{_key(config, task, rows)}.json"
    if kept.is_file():
        return msgspec.json.decode(kept.read_bytes(), type=dict[str, str])
    with progress_bar("Running the reference queries once") as report:
        permanent, passing = asyncio.run(_run_golds(config, task, rows, report))
    if not passing:  # what failed for reasons of today is tried again by the next run
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(msgspec.json.encode(permanent))
    return permanent | passing


async def _run_golds(
    config: Config, task: TextToSql, rows: Sequence[Row], report: Report
) -> tuple[dict[str, str], dict[str, str]]:
    """Reasons by row: of those that no day will mend, and of those that failed now."""
    from rewarders.answerers.base import UnusableRowError
    from rewarders.engines.base import EngineUnavailable

    permanent: dict[str, str] = {}
    passing: dict[str, str] = {}
    turns = asyncio.Semaphore(2 * config.search.sql.processes)
    done = 0

    async def check(row: Row) -> None:
        nonlocal done
        async with turns:
            for attempt in range(_ATTEMPTS):
                try:
                    await answerer.gold(row)
                except UnusableRowError as error:
                    permanent[row.id] = error.reason
                except EngineUnavailable as error:
                    if attempt + 1 < _ATTEMPTS:
                        continue
                    passing[row.id] = error.reason
                break
        done += 1
        report(done / len(rows), f"{done} of {len(rows)}")

    async with sql_answerer_of(config, task) as answerer, asyncio.TaskGroup() as group:
        for row in rows:
            group.create_task(check(row))
    order = [row.id for row in rows]
    return {row: permanent[row] for row in order if row in permanent}, {
        row: passing[row] for row in order if row in passing
    }


def _key(config: Config, task: TextToSql, rows: Sequence[Row]) -> str:
    """Of everything that decides the outcome; a database is known by its size and time of change."""
    databases = sorted(
        (str(path), path.stat().st_size, path.stat().st_mtime_ns)
        for path in (Path(config.data.corpus) / "databases").rglob("*")
        if path.is_file()
    )
    asked = [(row.id, row.database, task.executable(row.gold_sql)) for row in rows]
    known = msgspec.json.encode([_FORMAT, config.search.sql.deadline_s, databases, asked])
    return hashlib.sha256(known).hexdigest()[:24]
