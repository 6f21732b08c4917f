"""What the scorer needs: somebody who takes an answer to where it can be tried, and says what came of it."""

from __future__ import annotations

from abc import ABC, abstractmethod

from common.tasks import Outcome, ParsedAnswer, Row
from rewarders.errors import FatalScoringError
from rewarders.lifecycle import Started


class UnusableRowError(FatalScoringError):
    """No answer to this row can ever be scored: it belongs out of the data (`deepretrieval data check` finds it)."""

    def __init__(self, row: Row, reason: str) -> None:
        self.reason = reason
        super().__init__(f"row {row.id!r}: {reason}")


class Answerer(Started, ABC):
    """Tries answers concurrently; use it as an async context manager."""

    async def start(self) -> None:
        """Open what answering needs. Called once, before the first answer."""

    async def close(self) -> None:
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
