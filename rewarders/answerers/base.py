"""What the scorer needs: somebody who takes an answer to where it can be tried, and says what came of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

from common.tasks import Outcome, ParsedAnswer, Row
from rewarders.errors import FatalScoringError


class UnusableRowError(FatalScoringError):
    """No answer to this row can ever be scored: it belongs out of the data (`deepretrieval data check` finds it)."""

    def __init__(self, row: Row, reason: str) -> None:
        self.reason = reason
        super().__init__(f"row {row.id!r}: {reason}")


class Answerer(ABC):
    """Tries answers concurrently; use it as an async context manager."""

    async def start(self) -> None:  # noqa: B027 (one may need no start)
        """Open what answering needs. Called once, before the first answer."""

    async def close(self) -> None:  # noqa: B027
        """Release everything; answers under way fail with `EngineUnavailable`."""

    @abstractmethod
    async def outcome(self, answer: ParsedAnswer, row: Row) -> Outcome:
        """What the answer brings for the request `row`, retries included.

        Raises:
            BadQuery: the answer itself is at fault. EngineUnavailable: nobody knows what it is worth.
            UnusableRowError: nobody will ever know.
        """

    def counters(self) -> dict[str, float]:
        """Figures since the start, for the status of the rewarder."""
        return {}

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()
