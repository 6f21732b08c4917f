"""How far an evaluation is: a bar in a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Final, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from deploy.evaluation.records import QueryRecord

_LINE_EVERY_S: Final = 10.0


class EvaluationProgress:
    """The requests of one method.

    name: of the method. total: all requests; todo: those that are not finished yet.
    """

    def __init__(self, name: str, total: int, todo: int, console: Console) -> None:
        self._name, self._total, self._todo = name, total, todo
        self._console = console
        self._done = 0
        self._samples = 0
        self._apart = 0
        self._began = self._said_at = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(name, total=total, completed=total - todo, rate="")

    def __enter__(self) -> Self:
        self._bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.__exit__(kind, error, trace)
        if kind is None and not self._console.is_terminal:
            self._say()

    def advance(self, record: QueryRecord) -> None:
        """One more request is finished."""
        self._done += 1
        self._samples += len(record.samples)
        self._apart += bool(record.apart)
        self._bar.update(self._task, advance=1, rate=self._rate())
        if not self._console.is_terminal and time.monotonic() - self._said_at > _LINE_EVERY_S:
            self._said_at = time.monotonic()
            self._say()

    def _rate(self) -> str:
        per_s = self._samples / max(time.monotonic() - self._began, 1e-9)
        apart = f", {self._apart} not scored" if self._apart else ""
        return f"{per_s:.1f} answers/s{apart}"

    def _say(self) -> None:
        left = self._todo - self._done
        eta = f", {left * (time.monotonic() - self._began) / self._done:.0f} s left" if left and self._done else ""
        done = self._total - left
        self._console.print(f"{self._name}: {done}/{self._total}, {self._rate()}{eta}", highlight=False, soft_wrap=True)
