"""Starting and stopping an HTTP server: the part that does not depend on what it serves."""

from __future__ import annotations

import asyncio
import errno
import signal
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self, TypeVar

from aiohttp import web

MAX_LINE_BYTES = 1 << 17
_BACKLOG = 4096  # connections that may wait to be accepted: a rewarder may open thousands at once


class SearchServerError(RuntimeError):
    """The server cannot start. The message is one line and says what to do."""


class Hosted:
    """A server that accepts connections. Closing it (or leaving `async with`) frees the port."""

    def __init__(self, runner: web.AppRunner, place: str) -> None:
        self._runner = runner
        self._place = place
        self.port: int = runner.addresses[0][1]

    @property
    def base_url(self) -> str:
        """What takes the place of the real service's scheme and host."""
        place = f"[{self._place}]" if ":" in self._place else self._place
        return f"http://{place}:{self.port}"

    async def close(self) -> None:
        await self._runner.cleanup()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


ServerT = TypeVar("ServerT", bound=Hosted)
IndexT = TypeVar("IndexT")


async def host(application: web.Application, place: str, port: int) -> web.AppRunner:
    """Listen at `place` (a host name or address) and `port`, in the running event loop.

    Raises:
        SearchServerError: the port cannot be had.
    """
    # No access log: it would hold API keys. Signals are left to whoever owns the event loop.
    runner = web.AppRunner(
        application, access_log=None, handle_signals=False, shutdown_timeout=1.0, max_line_size=MAX_LINE_BYTES
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, place, port, backlog=_BACKLOG).start()
    except (OSError, OverflowError) as error:
        await runner.cleanup()
        raise SearchServerError(_port_message(f"{place}:{port}", error)) from None
    return runner


def run_until_signal(
    build: Callable[[], IndexT],
    start: Callable[[IndexT], Awaitable[ServerT]],
    describe: Callable[[ServerT], str],
    say: Callable[[str], None] | None,
) -> None:
    """Build an index, serve it until SIGINT or SIGTERM, then return.

    Args:
        describe: one line about a server, said (None: printed) once it listens.
    """
    # While the index is built there is no event loop to take signals, and an interrupted build must clean up.
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        index = build()
        asyncio.run(_serve_until_signal(lambda: start(index), describe, say or _print_line))
    except KeyboardInterrupt:
        return
    finally:
        signal.signal(signal.SIGTERM, previous)


async def _serve_until_signal(
    start: Callable[[], Awaitable[ServerT]], describe: Callable[[ServerT], str], say: Callable[[str], None]
) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    starting = asyncio.ensure_future(start())
    stopping = asyncio.ensure_future(stop.wait())
    await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():  # a server may build its index while it starts; that must not outlive the signal
        starting.cancel()
        await asyncio.wait({starting})
        return
    try:
        async with await starting as server:
            say(describe(server))
            await stopping
    finally:
        stopping.cancel()


def _print_line(line: str) -> None:
    print(line, flush=True)


def _port_message(place: str, error: OSError | OverflowError) -> str:
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return f"{place} is in use: stop what listens there or choose another port"
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"cannot listen on {place} ({reason}): choose another host or port"
