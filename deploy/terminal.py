"""What long work shows on the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable


class progress_bar:  # noqa: N801 - used like a function
    """A progress bar on stderr fed by (share done, what is going on); plain lines where there is no terminal."""

    def __init__(self, title: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
        )
        self._progress = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._title = title
        self._said_at = 0.0

    def __enter__(self) -> Callable[[float, str], None]:
        self._progress.__enter__()
        self._task = self._progress.add_task(self._title, total=1.0)
        return self._report

    def __exit__(self, *exception: object) -> None:
        self._progress.__exit__(None, None, None)

    def _report(self, share: float, text: str) -> None:
        self._progress.update(self._task, completed=share, description=f"{self._title}: {text}")
        if not self._console.is_terminal and time.monotonic() - self._said_at > 10:
            self._said_at = time.monotonic()
            print(f"{self._title}: {text} ({share:.0%})", file=sys.stderr, flush=True)
