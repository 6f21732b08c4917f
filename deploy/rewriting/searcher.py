"""The engine of one task, for users: started, behind cache, retries and quota, and answering with what people read."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from common.config import Config
from common.run_folder import RunFolder
from common.tasks import Row, Task
from deploy.engines import answerer_of
from deploy.local_quota import LocalQuota
from deploy.rewriting.documents import Titles, public_url
from deploy.rewriting.results import Found, Hit, ShownCell
from deploy.search_cache import cache_settled
from deploy.search_process import own_search_server

if TYPE_CHECKING:
    from common.sql.table import Cell, Table
    from rewarders.answerers.search import SearchAnswerer
    from rewarders.answerers.sql import SqlAnswerer
    from rewarders.engines.base import SearchResult

MOST_HITS: Final = 1000


class Searcher(AbstractAsyncContextManager["Searcher"]):
    """Searches as the rewarders of a run do.

    config: `data.corpus` is a folder. folder: for the log of a search server of its own.
    """

    def __init__(self, config: Config, task: Task, folder: Path) -> None:
        self.config = config
        self._task = task
        self._folder = folder
        self._titles = Titles(Path(config.data.corpus))
        self._open = AsyncExitStack()
        self._search: SearchAnswerer | None = None
        self._sql: SqlAnswerer | None = None

    async def __aenter__(self) -> Self:
        """Raises LaunchError, EngineUnavailable: it cannot be searched."""
        try:
            await self._start()
        except BaseException:
            await self._open.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._open.aclose()

    async def search(self, query: str, row: Row, top: int) -> Found:
        """What a query brings for a request: its `max_date` bounds a dated task, its `database` is the one of SQL.

        Raises:
            EngineUnavailable: nobody knows, after the retries. ValueError: it cannot be searched like that.
        """
        if self._sql is not None:
            return await self._run_sql(query, row.database, top)
        from rewarders.engines.base import BadQuery
        from rewarders.errors import ScoringError

        assert self._search is not None, "use the searcher as an async context manager"
        try:
            result = await self._search.search(query, row, retmax=min(top, MOST_HITS), with_texts=False)
        except BadQuery as error:
            return Found(query=query, refused=error.reason)
        except ScoringError as error:
            raise ValueError(str(error)) from None
        return Found(
            query=query,
            count=result.count,
            hits=await self._hits(result),
            translation=result.translation,
            warnings=result.warnings,
        )

    async def _start(self) -> None:
        from rewarders.answerers.search import SearchAnswerer
        from rewarders.answerers.sql import SqlAnswerer

        config = await self._open.enter_async_context(
            own_search_server(self.config, self._folder / f"search-server-{self._task.name}.log")
        )
        cache = cache_settled(config, RunFolder(self._folder.resolve()))
        self.config = config.model_copy(update={"search": config.search.model_copy(update={"cache": cache})})
        permit = None if config.search.quota is None else LocalQuota(config).permit
        answerer = await self._open.enter_async_context(answerer_of(self.config, self._task, permit))
        self._search = answerer if isinstance(answerer, SearchAnswerer) else None
        self._sql = answerer if isinstance(answerer, SqlAnswerer) else None

    async def _hits(self, result: SearchResult) -> tuple[Hit, ...]:
        titles: Sequence[str] = result.titles or ()
        if not titles:
            titles = await asyncio.to_thread(self._titles.of, result.ids)
        hits = zip(result.ids, titles, strict=True)
        return tuple(Hit(id=each, title=title, url=public_url(self.config, each)) for each, title in hits)

    async def _run_sql(self, sql: str, database: str, top: int) -> Found:
        from rewarders.sql.errors import SqlRefused, SqlTimeout

        assert self._sql is not None
        try:
            table: Table = await self._sql.run(sql, database)
        except (SqlRefused, SqlTimeout) as error:
            return Found(query=sql, refused=error.reason)
        shown = tuple(tuple(map(_shown, row)) for row in table.rows[:top])
        truncated = table.truncated or len(shown) < len(table.rows)
        return Found(query=sql, count=len(table.rows), columns=table.columns, rows=shown, truncated=truncated)


def _shown(cell: Cell) -> ShownCell:
    return cell.hex() if isinstance(cell, bytes) else cell
