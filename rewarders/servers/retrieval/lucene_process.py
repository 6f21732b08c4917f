"""The backend's end of one JVM process: start it, ask it, kill it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Self

import msgspec

import common
import rewarders
from rewarders.frames import LENGTH_BYTES, frame
from rewarders.servers.index_cache import Progress
from rewarders.servers.retrieval.backend import Query
from rewarders.servers.retrieval.lucene_wire import (
    Answer,
    Answers,
    Batch,
    Build,
    Built,
    FromWorker,
    Open,
    Opened,
    Progressed,
    ToWorker,
)

START_DEADLINE_S: Final = 120.0
_REAP_DEADLINE_S: Final = 10.0
_STDERR_KEPT: Final = 8192
_FROM_OUTSIDE: Final = frozenset({signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT})
# What a JVM and pyserini need of this process's environment; no secret is among them, and no option for Java.
_PASSED_ON: Final = ("HOME", "JAVA_HOME", "LANG", "LC_ALL", "PATH", "TMPDIR")


class WorkerDied(Exception):  # noqa: N818
    """The process ended, or was ended because it did not answer. reason: one line. by_itself: nobody outside did it,
    so what it was asked may be to blame.
    """

    def __init__(self, reason: str, by_itself: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.by_itself = by_itself


class LuceneProcess:
    """One JVM; made by `open`. opened: what it said of itself."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)
        self._last_words = b""
        self._listening = asyncio.ensure_future(self._listen())
        self.opened = Opened(0, "")

    @classmethod
    async def open(cls, setup: Open) -> Self:
        """Start a process and wait until its index is open. Raises WorkerDied."""
        worker = await cls._start()
        try:
            reply = await worker._ask(setup, START_DEADLINE_S)
            if not isinstance(reply, Opened):
                raise WorkerDied("a BM25 worker answered out of turn", by_itself=True)
        except BaseException:
            await worker.reap()
            raise
        worker.opened = reply
        return worker

    @classmethod
    async def build(cls, order: Build, progress: Progress) -> None:
        """Build an index in a process of its own. Raises WorkerDied."""
        worker = await cls._start()
        try:
            worker._send(order)
            while not isinstance(reply := await worker._receive(), Built):
                if isinstance(reply, Progressed):
                    progress(reply.done, reply.total)
        finally:
            await worker.reap()

    @classmethod
    async def _start(cls) -> Self:
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "rewarders.servers.retrieval.lucene_worker"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=_environment(),
                cwd="/",
                limit=1 << 20,
            )
        except OSError as error:
            raise WorkerDied(f"cannot start a BM25 worker: {error}", by_itself=False) from error
        return cls(process)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.returncode is None

    async def answer(self, queries: Sequence[Query], deadline_s: float) -> tuple[Answer, ...]:
        """One answer per query. Raises WorkerDied, also if the deadline passes; then the process must be reaped."""
        reply = await self._ask(Batch(tuple(queries)), deadline_s)
        if not isinstance(reply, Answers) or len(reply.answers) != len(queries):
            raise WorkerDied("a BM25 worker answered out of turn", by_itself=True)
        return reply.answers

    async def reap(self) -> None:
        """Kill the process and wait until it is gone."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_REAP_DEADLINE_S):
                await self._process.wait()
                await self._listening
        self._listening.cancel()

    async def _ask(self, message: ToWorker, deadline_s: float) -> FromWorker:
        try:
            async with asyncio.timeout(deadline_s):
                self._send(message)
                return await self._receive()
        except TimeoutError:
            raise WorkerDied(f"a BM25 worker did not answer within {deadline_s:g} s", by_itself=False) from None

    def _send(self, message: ToWorker) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(frame(self._encoder.encode(message)))

    async def _receive(self) -> FromWorker:
        assert self._process.stdout is not None
        try:
            length = int.from_bytes(await self._process.stdout.readexactly(LENGTH_BYTES), "big")
            return self._decoder.decode(await self._process.stdout.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError):
            raise await self._obituary() from None
        except msgspec.DecodeError as error:
            raise WorkerDied(f"a BM25 worker sent what cannot be read: {error}", by_itself=True) from None

    async def _listen(self) -> None:
        """Keep the end of what the process says on its standard error, so that its pipe never fills up."""
        assert self._process.stderr is not None
        while words := await self._process.stderr.read(4096):
            self._last_words = (self._last_words + words)[-_STDERR_KEPT:]

    async def _obituary(self) -> WorkerDied:
        """How the process ended: its signal, or the last line on its standard error."""
        await self.reap()
        code = self._process.returncode
        if code is not None and code < 0:
            with contextlib.suppress(ValueError):
                name = signal.Signals(-code).name
                return WorkerDied(f"a BM25 worker was ended by {name}", by_itself=-code not in _FROM_OUTSIDE)
        lines = [line.strip() for line in self._last_words.decode(errors="replace").splitlines() if line.strip()]
        return WorkerDied(lines[-1][:300] if lines else f"a BM25 worker ended with status {code}", by_itself=True)


def _environment() -> dict[str, str]:
    places = {str(Path(str(module.__file__)).resolve().parents[1]) for module in (common, rewarders)}
    passed_on = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    return {**passed_on, "PYTHONPATH": os.pathsep.join(sorted(places)), "PYTHONUTF8": "1"}
