"""The engine of one task, for users: started, behind cache, retries and quota, and answering with what people read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from common.config import Config
from common.tasks import Row, Task
from deploy.engines import answerer_of
from deploy.local_quota import local_permit
from deploy.rewriting.documents import Titles, public_url
from deploy.rewriting.results import Found, Hit, ShownCell
from deploy.search_process import searchable

if TYPE_CHECKING:
    from common.sql.table import Cell
    from rewarders.answerers.base import Answerer
    from rewarders.answerers.sql import SqlAnswerer
    from rewarders.engines.base import SearchResult

MOST_HITS: Final = 1000


@asynccontextmanager
async def searcher_of(config: Config, task: Task, folder: Path) -> AsyncIterator[Searcher]:
    """A started searcher.

    Args:
        config: `data.corpus` is a folder. folder: for the log of a search server of its own.

    Raises:
        LaunchError, EngineUnavailable: it cannot be searched.
    """
    async with (
        searchable(config, folder, folder / f"search-server-{task.name}.log") as served,
        answerer_of(served, task, local_permit(served)) as answerer,
    ):
        yield Searcher(config, answerer)


class Searcher:
    """Searches as the rewarders of a run do, with a started answerer."""

    def __init__(self, config: Config, answerer: Answerer) -> None:
        self._config = config
        self._answerer = answerer
        self._titles = Titles(Path(config.data.corpus))

    async def search(self, query: str, row: Row, top: int) -> Found:
        """What a query brings for a request: its `max_date` bounds a dated task, its `database` is the one of SQL.

        Raises:
            EngineUnavailable: nobody knows, after the retries. ValueError: it cannot be searched like that.
        """
        from rewarders.answerers.search import SearchAnswerer
        from rewarders.answerers.sql import SqlAnswerer
        from rewarders.engines.base import BadQuery
        from rewarders.errors import ScoringError

        if isinstance(self._answerer, SqlAnswerer):
            return await _run_sql(self._answerer, query, row.database, top)
        assert isinstance(self._answerer, SearchAnswerer)  # there is no third
        try:
            result = await self._answerer.search(query, row, retmax=min(top, MOST_HITS), with_texts=False)
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

    async def _hits(self, result: SearchResult) -> tuple[Hit, ...]:
        titles: Sequence[str] = result.titles or ()
        if not titles:
            titles = await asyncio.to_thread(self._titles.of, result.ids)
        hits = zip(result.ids, titles, strict=True)
        return tuple(Hit(id=each, title=title, url=public_url(self._config, each)) for each, title in hits)


async def _run_sql(answerer: SqlAnswerer, sql: str, database: str, top: int) -> Found:
    from rewarders.sql.errors import SqlRefused, SqlTimeout

    try:
        table = await answerer.run(sql, database)
    except (SqlRefused, SqlTimeout) as error:
        return Found(query=sql, refused=error.reason)
    shown = tuple(tuple(map(_shown, row)) for row in table.rows[:top])
    truncated = table.truncated or len(shown) < len(table.rows)
    return Found(query=sql, count=len(table.rows), columns=table.columns, rows=shown, truncated=truncated)


def _shown(cell: Cell) -> ShownCell:
    return cell.hex() if isinstance(cell, bytes) else cell
