"""All searches of a run, so that it can be repeated exactly and offline.

A recording is a folder with one file per host that scored; copied into one folder they are the recording of the whole
run. A query has one answer in it, the first that was given: the run itself is given that answer again too, also after
`--resume`, although the engine's data may have changed meanwhile. So the version of the data is no part of the key
here; it is noted beside. Outages are not recorded: a replay has none.

`RecordingEngine` writes, `ReplayEngine` reads; both take the place of the engine, below every cache.
"""

from __future__ import annotations

import contextlib
import socket
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

from rewarders.cache.found import Found, Refusal, answer_of, decode_found, encode_found
from rewarders.cache.key import SearchKey
from rewarders.cache.table import Row, SearchTable, is_damage
from rewarders.cache.table_thread import TableThread
from rewarders.engines.base import BadQuery, EngineUnavailable, SearchEngine, SearchRequest, SearchResult
from rewarders.errors import FatalScoringError

_SHOWN_CHARACTERS = 500  # of a query
_PATIENCE_S = 60.0  # for other processes that write: giving up ends the run


class RecordingError(FatalScoringError):
    """A recording cannot be written or read; the message names it and says what to do."""


class ReplayMiss(FatalScoringError):  # noqa: N818 (the name of what happened)
    """The recording has no answer to a query; the message names it.

    It is no outage, for no waiting mends it: it must pass through retries, cache and scorer, and end the rewarder.
    """


class RecordingEngine(SearchEngine):
    """Writes what `engine` says of every query, before anybody hears of it.

    folder: of the recording. kind: of the engine, as in the configuration. now: seconds since 1970.
    """

    def __init__(
        self, engine: SearchEngine, folder: Path, kind: str, *, host: str = "", now: Callable[[], float] = time.time
    ) -> None:
        self._engine = engine
        self._kind = kind
        self._now = now
        self._path = folder / f"{host or socket.gethostname()}.sqlite"
        self._thread: TableThread | None = None
        self._version_noted = False

    async def start(self) -> None:
        """Open the file and start the engine. Raises RecordingError."""
        thread = TableThread(SearchTable(self._path, busy_s=_PATIENCE_S), SearchTable.add)
        try:
            await thread.run(self._open)
        except (sqlite3.Error, OSError) as error:
            await thread.close()
            raise self._unusable(error) from None
        except BaseException:
            await thread.close()
            raise
        self._thread = thread
        await self._engine.start()

    async def close(self) -> None:
        await self._engine.close()
        thread, self._thread = self._thread, None
        if thread is not None:
            await thread.close()

    async def check(self) -> None:
        await self._engine.check()

    def counters(self) -> dict[str, float]:
        return self._engine.counters()

    async def data_version(self) -> str:
        """None that anything depends on: an answer that is recorded holds for the whole run."""
        return ""

    async def search(self, request: SearchRequest) -> SearchResult:
        """The recorded answer, or the engine's, which is recorded first. Raises as the engine does, and
        RecordingError."""
        if self._thread is None:
            raise EngineUnavailable("the recording is closed")
        try:
            return answer_of(await self._search(self._thread, request))
        except (sqlite3.Error, OSError) as error:
            raise self._unusable(error) from None

    async def _search(self, thread: TableThread, request: SearchRequest) -> Found:
        key = _key(request)
        recorded = await thread.run(lambda table: table.get(key.digest))
        if recorded is None:
            found = await self._ask(request)
            now = self._now()
            await thread.put(Row(key.digest, encode_found(found), key.readable, now, now))
            recorded = await thread.run(lambda table: table.get(key.digest))  # another process may have been first
        if recorded is None:
            raise sqlite3.DatabaseError("what was written is not there")
        return _decoded(recorded, self._path)

    async def _ask(self, request: SearchRequest) -> Found:
        try:
            found: Found = await self._engine.search(request)
        except BadQuery as error:
            found = Refusal(error.reason)
        await self._note_version()
        return found

    async def _note_version(self) -> None:
        """The first is kept; where the engine cannot say now, it is asked after the next search."""
        if self._version_noted or self._thread is None:
            return
        with contextlib.suppress(EngineUnavailable):
            version = await self._engine.data_version()
            await self._thread.run(lambda table: table.state("data_version", version))
            self._version_noted = True

    def _open(self, table: SearchTable) -> None:
        table.open()
        table.state("engine", self._kind)
        _check_kind(table, self._kind)

    def _unusable(self, error: Exception) -> RecordingError:
        advice = "move it away" if is_damage(error) else "free space, or name another folder as search.cache.folder"
        return RecordingError(f"the recording {self._path} cannot be written ({error}): {advice}")


class ReplayEngine(SearchEngine):
    """Answers from a recording and contacts nobody.

    folder: of the recording; all its files are read. kind: of the engine that was recorded.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self._folder = folder
        self._kind = kind
        self._threads: list[TableThread] = []
        self._version = ""

    async def start(self) -> None:
        """Open the files. Raises RecordingError: there is none, or one of another engine."""
        paths = sorted(self._folder.glob("*.sqlite"))
        if not paths:
            raise RecordingError(
                f"there is no recording in {self._folder}: run once with search.cache.mode=record, or name the folder "
                "of one as search.cache.folder"
            )
        try:
            for path in paths:
                await self._open(path)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        threads, self._threads = self._threads, []
        for thread in threads:
            await thread.close()

    async def check(self) -> None:
        """Nothing: opening the files said all there is to say."""

    async def data_version(self) -> str:
        """The engine's when the recording began."""
        return self._version

    async def search(self, request: SearchRequest) -> SearchResult:
        """The recorded answer. Raises BadQuery where that is a refusal, ReplayMiss where there is none."""
        key = _key(request)
        rows = [await thread.run(lambda table: table.get(key.digest)) for thread in self._threads]
        recorded = min((row for row in rows if row is not None), key=lambda row: row.made_at, default=None)
        if recorded is None:
            if not self._threads:
                raise EngineUnavailable("the recording is closed")
            raise ReplayMiss(
                f"the recording in {self._folder} has no answer to the query {_shown(request)}: replay with the "
                "configuration, seed and data of the recorded run, or record it again"
            )
        return answer_of(_decoded(recorded, self._folder))

    async def _open(self, path: Path) -> None:
        def opened(table: SearchTable) -> str:
            table.open()
            _check_kind(table, self._kind)
            return table.fact("data_version") or ""

        thread = TableThread(SearchTable(path, read_only=True), SearchTable.add)
        self._threads.append(thread)
        try:
            version = await thread.run(opened)
        except sqlite3.Error as error:
            raise RecordingError(f"the recording {path} cannot be read ({error}): copy it again") from None
        self._version = self._version or version


def _key(request: SearchRequest) -> SearchKey:
    return SearchKey("", "", request)


def _check_kind(table: SearchTable, kind: str) -> None:
    recorded = table.fact("engine")
    if recorded != kind:
        raise RecordingError(f"the recording {table.path} is one of {recorded}, but search.engine is {kind}")


def _decoded(row: Row, place: Path) -> Found:
    try:
        return decode_found(row.value)
    except ValueError as error:
        raise RecordingError(f"the recording {place} is damaged at {row.asked[:_SHOWN_CHARACTERS]}: {error}") from None


def _shown(request: SearchRequest) -> str:
    dates = "".join(f", {name} {date}" for name, date in (("from", request.min_date), ("to", request.max_date)) if date)
    term = request.term if len(request.term) <= _SHOWN_CHARACTERS else f"{request.term[:_SHOWN_CHARACTERS]}..."
    return f"{term!r} (retmax {request.retmax}, sort {request.sort}{dates})"
