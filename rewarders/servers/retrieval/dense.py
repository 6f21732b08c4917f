"""Dense retrieval as a backend of the retrieval server: the light end, which imports neither torch nor faiss.

Encoder and index have a process of their own: their packages take seconds to import, during which a thread would hold
up the server's event loop; what ends them (memory, a broken driver) leaves the server standing; and it costs next to
nothing, since a batch crosses the pipe as numbers.

Memory here: some 60 bytes per document for the ids. The other process: see `dense_index.open_index`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Final, NamedTuple, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

import common
import rewarders
from common.data.beir import DataError
from rewarders.engines.base import EngineUnavailable
from rewarders.frames import LENGTH_BYTES, frame
from rewarders.servers.hosting import SearchServerError
from rewarders.servers.index_cache import Progress as ReportProgress
from rewarders.servers.index_cache import default_cache_folder
from rewarders.servers.retrieval.backend import Backend, Query, Ranking, Refusal
from rewarders.servers.retrieval.dense_wire import (
    MAX_FRAME_BYTES,
    DenseSettings,
    Failed,
    Found,
    Progress,
    Ready,
    Reply,
    Search,
    Setup,
)
from rewarders.servers.retrieval.passages import read_passages

__all__ = ["DenseBackend", "DenseSettings"]

_REAP_DEADLINE_S: Final = 5.0
_LAST_WORDS_BYTES: Final = 4096
_PIPE_BUFFER: Final = 1 << 20


class DenseBackend(Backend):
    """A faiss index over a BEIR folder. encoded: passages that the last start had to encode (0: all were cached).

    If the process of the index dies, the searches it had fail with EngineUnavailable and the next one starts another,
    from the cache.
    """

    kind: ClassVar[str] = "dense"

    def __init__(
        self,
        corpus: Path,
        settings: DenseSettings,
        cache_folder: Path | None = None,
        progress: ReportProgress | None = None,
    ) -> None:
        """cache_folder: None for `dense` below the default cache. progress: called while passages are encoded."""
        self.batch = settings.batch
        self.encoded = 0
        self._setup = Setup(str(corpus), str(cache_folder or default_cache_folder("dense")), settings)
        self._progress = progress or (lambda done, total: None)
        self._process: _Process | None = None
        self._starting = asyncio.Lock()
        self._index: _Opened | None = None
        self._open = False

    async def start(self) -> None:
        self._open = True
        await self._start_process()

    async def close(self) -> None:
        self._open = False
        process, self._process = self._process, None
        if process is not None:
            await process.end()

    @property
    def size(self) -> int:
        return len(self._known().ids)

    @property
    def version(self) -> str:
        return self._known().ready.version

    async def search(self, queries: Sequence[Query]) -> list[Ranking | Refusal]:
        """One answer per query; an empty query, or one that is no Unicode text, is refused."""
        refusals = [_refusal(query) for query in queries]
        sent = [query for query, refusal in zip(queries, refusals, strict=True) if refusal is None]
        found = iter(await self._found(sent) if sent else ())
        return [refusal or next(found) for refusal in refusals]

    async def _found(self, queries: list[Query]) -> list[Ranking]:
        if not self._open:
            raise EngineUnavailable("the dense index is not open")
        try:
            async with self._starting:
                if self._process is None or not self._process.alive:
                    await self._start_process()
                process = self._process
            assert process is not None
            found = await process.search([query.term for query in queries], [query.k for query in queries])
            return list(self._known().rankings(found))
        except (DataError, SearchServerError, _Died) as error:
            raise EngineUnavailable(str(error)) from None

    async def _start_process(self) -> None:
        old, self._process = self._process, None
        if old is not None:
            await old.end()
        process = await _Process.start(self._setup.settings.threads)
        try:
            ready = await process.greet(self._setup, self._progress)
            ids = (await asyncio.to_thread(read_passages, Path(ready.passages))).ids
        except _Died as died:
            await process.end()
            raise SearchServerError(str(died)) from None
        except OSError as error:
            await process.end()
            raise SearchServerError(f"cannot read the cache of the dense index: {error}: try again") from None
        except BaseException:
            await process.end()
            raise
        self.encoded, self._process = ready.encoded, process
        self._index = _Opened(ready, np.array(ids, dtype=object))

    def _known(self) -> _Opened:
        if self._index is None:
            raise SearchServerError("the dense index is not open: start it first")
        return self._index


class _Opened(NamedTuple):
    """ids: of the documents, by number, as objects."""

    ready: Ready
    ids: NDArray[np.object_]

    def rankings(self, found: Found) -> Iterator[Ranking]:
        documents, scores = np.frombuffer(found.documents, np.int32), np.frombuffer(found.scores, np.float32)
        end = 0
        for length in found.lengths:
            start, end = end, end + length
            count = len(self.ids) if length else 0
            ids = self.ids[documents[start:end]].tolist()
            yield Ranking(tuple(ids), tuple(scores[start:end].tolist()), count)


class _Died(Exception):  # noqa: N818
    """The process ended, or cannot be understood. One line."""


class _Process:
    """One process of an index; made by `start`, of use after `greet`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Found | Failed]] = {}
        self._last_words = b""
        self._listening = asyncio.ensure_future(self._listen_to_errors())
        self._receiving: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, threads: int) -> Self:
        try:
            return cls(
                await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "rewarders.servers.retrieval.dense_worker"),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.PIPE,
                    env=_environment(threads),
                    limit=_PIPE_BUFFER,
                )
            )
        except OSError as error:
            raise SearchServerError(f"cannot start the process of the dense index: {error}: free memory") from None

    @property
    def alive(self) -> bool:
        return self._process.returncode is None and self._receiving is not None and not self._receiving.done()

    async def greet(self, setup: Setup, progress: ReportProgress) -> Ready:
        """Wait, as long as it takes, until the index is open. Raises _Died, DataError or SearchServerError."""
        await self._send(setup)
        while True:
            reply = await self._next()
            match reply:
                case Progress(done, total):
                    progress(done, total)
                case Ready():
                    self._receiving = asyncio.ensure_future(self._receive())
                    return reply
                case Failed(kind="corpus"):
                    raise DataError(reply.reason)
                case Failed():
                    raise SearchServerError(reply.reason)
                case _:
                    raise _Died("the process of the dense index answered out of turn")

    async def search(self, terms: list[str], ks: list[int]) -> Found:
        """Raises _Died, or EngineUnavailable if this search alone failed."""
        number = next(self._numbers)
        answer: asyncio.Future[Found | Failed] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            await self._send(Search(number, terms, ks))
            reply = await answer
        finally:
            self._waiting.pop(number, None)
        if isinstance(reply, Failed):
            raise EngineUnavailable(reply.reason)
        return reply

    async def end(self) -> None:
        """Kill the process and wait until it is gone: it holds nothing that is not in the cache."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        for task in filter(None, (self._receiving, self._listening)):
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        self._fail(_Died("the dense index was closed"))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_REAP_DEADLINE_S):
                await self._process.wait()
        transport = getattr(self._process, "_transport", None)
        if transport is not None:
            transport.close()

    async def _send(self, message: Setup | Search) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(frame(self._encoder.encode(message)))
        # A process that is gone is noticed where its answer is awaited.
        with contextlib.suppress(ConnectionError):
            await self._process.stdin.drain()

    async def _receive(self) -> None:
        """Hand every answer to who waits for it; one whose asker was cancelled is dropped."""
        try:
            while True:
                reply = await self._next()
                waiting = self._waiting.get(reply.number) if isinstance(reply, Found | Failed) else None
                if waiting is not None and not waiting.done():
                    waiting.set_result(reply)  # type: ignore[arg-type]
        except _Died as died:
            self._fail(died)

    def _fail(self, died: _Died) -> None:
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(died)

    async def _next(self) -> Reply:
        assert self._process.stdout is not None
        try:
            length = int.from_bytes(await self._process.stdout.readexactly(LENGTH_BYTES), "big")
            if length > MAX_FRAME_BYTES:
                raise _Died(f"the process of the dense index sent {length} bytes, which is more than it may")
            return self._decoder.decode(await self._process.stdout.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError):
            raise await self._obituary() from None
        except msgspec.DecodeError as error:
            raise _Died(f"the process of the dense index sent what cannot be read: {error}") from None

    async def _obituary(self) -> _Died:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_REAP_DEADLINE_S):
                await self._process.wait()
                await asyncio.gather(self._listening, return_exceptions=True)
        code = self._process.returncode
        if code is not None and code < 0:
            name = signal.Signals(-code).name if -code in signal.valid_signals() else str(-code)
            hint = ": free memory, if that was it" if -code == signal.SIGKILL else ""
            return _Died(f"the process of the dense index was ended by {name}{hint}")
        lines = self._last_words.decode("utf-8", "replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        return _Died(f"the process of the dense index ended: {said}")

    async def _listen_to_errors(self) -> None:
        assert self._process.stderr is not None
        while words := await self._process.stderr.read(_LAST_WORDS_BYTES):
            self._last_words = (self._last_words + words)[-_LAST_WORDS_BYTES:]


def _refusal(query: Query) -> Refusal | None:
    if query.rm3:
        return Refusal("RM3 is for BM25: a dense index has no terms to weigh")
    if not query.term.strip():
        return Refusal("the query is empty")
    try:
        query.term.encode("utf-8")
    except UnicodeEncodeError:
        return Refusal("the query is not valid Unicode text")
    return None


def _environment(threads: int) -> dict[str, str]:
    """Ours, with the packages we run from in reach and libraries that keep to their threads."""
    folders = [str(Path(module.__file__ or "").parent.parent) for module in (common, rewarders)]
    inherited = os.environ.get("PYTHONPATH")
    path = os.pathsep.join(dict.fromkeys([*folders, *([inherited] if inherited else [])]))
    tokenizers = {"TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false", "RAYON_NUM_THREADS": str(threads)}
    return os.environ | tokenizers | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
