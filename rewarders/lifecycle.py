"""What is started before its first use and closed after its last."""

from __future__ import annotations

from types import TracebackType
from typing import Self


class Started:
    """To be used as an async context manager."""

    async def start(self) -> None:
        """Open what is needed. Called once, before the first use."""

    async def close(self) -> None:
        """Release everything."""

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()
