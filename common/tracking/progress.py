"""Live progress of a run in the terminal; one plain line now and then where there is no terminal."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from rich.console import Console
from rich.live import Live

from common.tracking.jsonl import parse_lines
from common.tracking.metrics_log import Metrics, merge_steps
from common.tracking.progress_state import ProgressState, build_state
from common.tracking.progress_view import render, render_line

Snapshot = Mapping[str, Any]


class MetricsTail:
    """Reads what was appended to a growing metrics.jsonl since the last call."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._start_over()

    def _start_over(self) -> None:
        self._offset, self._lines_read = 0, 0
        self._identity: int | None = None
        self._metrics: list[Metrics] = []

    def read(self) -> list[Metrics]:
        """One dict per step so far; an empty list before the file exists.

        A file that became shorter or was replaced (a run resumed from an earlier step) is read anew.

        Raises:
            ValueError: a whole line is not a JSON object.
        """
        try:
            with open(self._path, "rb") as file:
                self._read_from(file)
        except FileNotFoundError:
            self._start_over()
        return self._metrics

    def _read_from(self, file: BinaryIO) -> None:
        stat = os.fstat(file.fileno())
        if stat.st_size < self._offset or stat.st_ino != self._identity:
            self._start_over()
            self._identity = stat.st_ino
        file.seek(self._offset)
        fresh = file.read()
        whole = fresh[: fresh.rfind(b"\n") + 1]
        lines = whole.split(b"\n")[:-1]
        records = parse_lines(lines, self._path, first=self._lines_read + 1)
        self._offset += len(whole)
        self._lines_read += len(lines)
        if records:
            self._metrics = merge_steps([*self._metrics, *records])


class LiveProgress:
    """Shows a run while it goes on; a context manager.

    Args:
        metrics_path: the run's metrics.jsonl, which may not exist yet.
        snapshot: called at each refresh; returns what `build_state` describes (run, steps, roles, ...).
            Must return quickly; what it raises is shown as the warning.
        console: where to draw; default: standard output.
        refresh_s: seconds between refreshes in a terminal.
        line_s: seconds between lines where the output is no terminal.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        metrics_path: str | Path,
        snapshot: Callable[[], Snapshot],
        *,
        console: Console | None = None,
        refresh_s: float = 0.5,
        line_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tail = MetricsTail(metrics_path)
        self._snapshot = snapshot
        self._console = console or Console()
        self._interval = refresh_s if self._console.is_terminal else line_s
        self._clock = clock
        self._started = clock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def state(self) -> ProgressState:
        """The present state, read from the metrics file and the snapshot."""
        problem, status, metrics = "", dict[str, Any](), list[Metrics]()
        try:
            status = dict(self._snapshot())
            metrics = self._tail.read()
        except Exception as error:  # the display must never end the run
            problem = f"progress display: {error}"
        if problem:
            status["warning"] = problem
        return build_state(metrics, status, self._clock() - self._started)

    def start(self) -> None:
        """Begin to draw, from a thread of its own."""
        self._thread = threading.Thread(target=self._draw, name="progress", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Draw the last state and leave it on the screen. A second call does nothing."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5.0)
            self._thread = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _draw(self) -> None:
        if self._console.is_terminal:
            self._draw_live()
        else:
            self._print_lines()

    def _draw_live(self) -> None:
        with Live(render(self.state()), console=self._console, auto_refresh=False) as live:
            while not self._stop.wait(self._interval):
                live.update(render(self.state()), refresh=True)
            live.update(render(self.state()), refresh=True)

    def _print_lines(self) -> None:
        while True:
            stopping = self._stop.is_set()
            self._console.print(render_line(self.state()), markup=False, highlight=False, soft_wrap=True, emoji=False)
            if stopping:
                return
            self._stop.wait(self._interval)
