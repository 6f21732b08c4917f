"""The pool's end of one worker process: start it, ask it, kill it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final, Self

import msgspec

import common
import rewarders
from rewarders.frames import LENGTH_BYTES, frame
from rewarders.sql.limits import SqlLimits
from rewarders.sql.wire import Failed, Query, Ready, Reply, Rows, Setup, checked

_START_DEADLINE_S: Final = 10.0
_REAP_DEADLINE_S: Final = 5.0
_OBITUARY_DEADLINE_S: Final = 0.2
# The worker stops itself at the deadline if it can; this much later it is killed.
KILL_GRACE_S: Final = 0.12
# Then it is looked for an answer that came unnoticed; one that is arriving may take a moment longer.
_LOOK_S: Final = 0.03
_TRANSFER_S: Final = 0.25
_STDERR_LIMIT: Final = 4096
_PIPE_BUFFER: Final = 1 << 20


class WorkerLate(Exception):  # noqa: N818
    """The deadline passed and the worker was killed. cpu_s: processor seconds of this query, None if unknown."""

    def __init__(self, cpu_s: float | None) -> None:
        super().__init__("the worker did not answer in time")
        self.cpu_s = cpu_s


class WorkerDied(Exception):  # noqa: N818
    """The worker ended without an answer. reason: one line. signal_number: what ended it, None if no signal did."""

    def __init__(self, reason: str, signal_number: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.signal_number = signal_number


class WorkerProcess:
    """One jailed process; made by `start`. ready: what it said of itself."""

    def __init__(self, process: asyncio.subprocess.Process, limits: SqlLimits) -> None:
        self._process = process
        self._limits = limits
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
        self._cpu_s = 0.0
        self._killed = False
        self._answering = False
        self.ready = Ready(sqlite="", guards=(), cpu_s=0.0)

    @classmethod
    async def start(cls, limits: SqlLimits, folders: Iterable[Path]) -> Self:
        """Start a process and wait until it is jailed. Raises WorkerDied with the reason if it cannot be."""
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-S", "-m", "rewarders.sql.worker"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=_environment(),
                cwd="/",
                limit=_PIPE_BUFFER,
            )
        except OSError as error:
            raise WorkerDied(f"cannot start a SQL worker: {error}") from error
        worker = cls(process, limits)
        try:
            await worker._greet(Setup(limits, tuple(map(str, folders))))
        except BaseException:
            await worker.reap()
            raise
        return worker

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return self._process.returncode is None and not self._killed

    async def ask(self, query: Query) -> tuple[Rows | Failed, float]:
        """Run one query; return the answer and the processor seconds it took.

        Raises WorkerLate shortly after the query's deadline and WorkerDied if the process ends; both times, and when
        cancelled, the process is gone.
        """
        before = self._cpu_s
        self._send(self._encoder.encode(query))
        receiving = asyncio.ensure_future(self._receive())
        try:
            reply = await self._within(receiving, query.deadline_s + KILL_GRACE_S)
        except BaseException:
            self.kill()
            receiving.cancel()
            await asyncio.gather(receiving, return_exceptions=True)
            raise
        if reply is None:
            raise WorkerLate(await self._end_late(receiving, before))
        if isinstance(reply, Ready):
            self.kill()
            raise WorkerDied("a SQL worker answered out of turn")
        self._cpu_s = reply.cpu_s
        return reply, reply.cpu_s - before

    def kill(self) -> None:
        """End the process at once, whatever it does."""
        self._killed = True
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def reap(self) -> None:
        """Kill the process and wait until it is gone and its pipes are closed."""
        self.kill()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_REAP_DEADLINE_S):
                await self._process.wait()
        transport = getattr(self._process, "_transport", None)
        if transport is not None:
            transport.close()

    async def _within(self, receiving: asyncio.Task[Reply], seconds: float) -> Reply | None:
        """Wait for the answer; None if it is late.

        This process may itself have been held up, while the answer lay in the pipe: it is late only if it is not there
        when somebody looks.
        """
        self._answering = False
        for patience in (seconds, _LOOK_S):
            await asyncio.wait({receiving}, timeout=patience)
            if receiving.done():
                return receiving.result()
        if self._answering:
            await asyncio.wait({receiving}, timeout=_TRANSFER_S)
        return receiving.result() if receiving.done() else None

    async def _end_late(self, receiving: asyncio.Task[Reply], before: float) -> float | None:
        """Kill the process; return the processor seconds that its query took, None if unknown."""
        total = _cpu_seconds(self.pid)
        self.kill()
        receiving.cancel()
        await asyncio.gather(receiving, return_exceptions=True)
        return None if total is None else total - before

    async def _greet(self, setup: Setup) -> None:
        try:
            async with asyncio.timeout(_START_DEADLINE_S):
                self._send(self._encoder.encode(setup))
                reply = await self._receive()
        except TimeoutError:
            raise WorkerDied("a SQL worker did not start in time: is the machine overloaded?") from None
        if not isinstance(reply, Ready):
            raise WorkerDied("a SQL worker answered out of turn")
        self.ready = reply
        self._cpu_s = reply.cpu_s

    def _send(self, message: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(frame(message))

    async def _receive(self) -> Reply:
        assert self._process.stdout is not None
        try:
            header = await self._process.stdout.readexactly(LENGTH_BYTES)
            self._answering = True
            length = int.from_bytes(header, "big")
            if length > self._limits.max_frame_bytes:
                raise WorkerDied(f"a SQL worker sent {length} bytes, which is more than it may")
            reply = self._decoder.decode(await self._process.stdout.readexactly(length))
            return checked(reply) if isinstance(reply, Rows) else reply
        except (asyncio.IncompleteReadError, ConnectionError):
            raise await self._obituary() from None
        except (msgspec.DecodeError, RecursionError) as error:
            raise WorkerDied(f"a SQL worker sent what cannot be read: {error}") from None

    async def _obituary(self) -> WorkerDied:
        """How the process ended: its signal, or the last line on its standard error."""
        assert self._process.stderr is not None
        words = b""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_OBITUARY_DEADLINE_S):
                words = await self._process.stderr.read(_STDERR_LIMIT)
                await self._process.wait()
        code = self._process.returncode
        if code is not None and code < 0:
            return WorkerDied(f"a SQL worker was ended by {_signal_name(-code)}", -code)
        lines = [line.strip() for line in words.decode(errors="replace").splitlines() if line.strip()]
        return WorkerDied(f"a SQL worker ended: {lines[-1][:300] if lines else f'exit status {code}'}")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _environment() -> dict[str, str]:
    """No secret of this process reaches a worker: it gets the places of its few modules and one time zone for all."""
    places = {str(Path(str(module.__file__)).resolve().parents[1]) for module in (common, rewarders, msgspec)}
    return {
        "PYTHONPATH": os.pathsep.join(sorted(places)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUTF8": "1",
        "TZ": "UTC",
    }


def _cpu_seconds(pid: int) -> float | None:
    """Processor seconds of a process, read from outside; None where there is no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
