"""Answers that are SQL: run in the jail on the database of their row, beside the reference query.

A query of the model that fails is an outcome; a reference query that fails is nobody's answer, and earns nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

from common.sql.table import Table
from common.tasks import Execution, ParsedAnswer, Row
from common.tasks.text_to_sql import TextToSql
from rewarders.answerers.base import Answerer, UnusableRowError
from rewarders.engines.base import EngineUnavailable
from rewarders.sql.errors import GoldUnusable, SqlRefused, SqlTimeout, SqlUnavailable
from rewarders.sql.gold import GoldResults
from rewarders.sql.limits import SqlLimits
from rewarders.sql.pool import SqlPool

DATABASES_FOLDER: Final = "databases"
_SUFFIXES: Final = (".sqlite", ".db")
# The broker's leases bound how many groups a rewarder holds: the pool need not refuse callers as well.
_MAX_WAITING: Final = 1 << 20


class SqlAnswerer(Answerer):
    """Runs the answers of one task on the databases below `folder`.

    task: says how a query is prepared for its comparator. folder: holds NAME.sqlite or NAME/NAME.sqlite for every
    database NAME (the layout of Spider and BIRD). processes: queries at once. deadline_s: of one query.
    """

    def __init__(self, task: TextToSql, folder: Path, *, processes: int = 2, deadline_s: float = 30.0) -> None:
        self.task = task
        self.folder = folder
        limits = SqlLimits(deadline_s=deadline_s)
        self._pool = SqlPool(workers=processes, limits=limits, folders=[folder], max_waiting=_MAX_WAITING)
        self._golds = GoldResults(self._pool)

    async def start(self) -> None:
        """Start the jailed processes. Raises EngineUnavailable if one cannot start."""
        try:
            await self._pool.start()
        except SqlUnavailable as error:
            raise EngineUnavailable(error.reason) from None

    async def close(self) -> None:
        await self._golds.close()
        await self._pool.close()

    async def outcome(self, answer: ParsedAnswer, row: Row) -> Execution:
        gold = await self.gold(row)
        try:
            table = await self.run(answer.query, row.database)
        except SqlRefused as error:
            return Execution("refused", detail=error.reason)
        except SqlTimeout as error:
            return Execution("timeout", detail=error.reason)
        return Execution("ok", table=table, gold=gold)

    async def run(self, sql: str, database: str) -> Table:
        """The result of a query on the database of this name.

        Raises:
            SqlRefused, SqlTimeout: the query is at fault. EngineUnavailable: it could not be run.
        """
        try:
            return await self._pool.run(database_path(self.folder, database), self.task.executable(sql))
        except SqlUnavailable as error:
            raise EngineUnavailable(error.reason) from None

    async def gold(self, row: Row) -> Table:
        """The result of the row's reference query, run once and remembered.

        Raises:
            UnusableRowError: it will never have one. EngineUnavailable: not now.
        """
        database = database_path(self.folder, row.database)
        try:
            return await self._golds.get(database, self.task.executable(row.gold_sql))
        except GoldUnusable as error:
            raise UnusableRowError(row, error.reason) from None
        except SqlUnavailable as error:
            raise EngineUnavailable(f"row {row.id!r}: {error.reason}") from None

    def counters(self) -> dict[str, float]:
        stats = msgspec.structs.asdict(self._pool.stats)
        return {**{f"sql_{name}": float(value) for name, value in stats.items()}, "sql_golds": float(len(self._golds))}


def database_path(folder: Path, name: str) -> Path:
    """The file of the database `name`, which is a bare name: data must not lead out of the folder.

    Raises:
        EngineUnavailable: the name is none, or there is no such file.
    """
    if not name or name in (".", "..") or "\0" in name or Path(name).name != name or "\\" in name:
        raise EngineUnavailable(f"{name!r} is no name of a database: mend the rows")
    for suffix in _SUFFIXES:
        for path in (folder / f"{name}{suffix}", folder / name / f"{name}{suffix}"):
            if path.is_file():
                return path
    raise EngineUnavailable(f"there is no database {name!r} in {folder}: put {name}.sqlite there")
