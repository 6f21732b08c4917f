"""Leave to send one request upstream: where the quota enters the engines."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol


class Slot(Protocol):
    """A grant to send one request."""

    def replied(self) -> None:
        """Called at the first bytes of the reply: from here on the slot may be counted as used up."""


Permit = Callable[[], AbstractAsyncContextManager[Slot]]


class _FreeSlot:
    def replied(self) -> None:
        pass


@asynccontextmanager
async def unlimited() -> AsyncIterator[Slot]:
    """The permit of an engine without a quota."""
    yield _FreeSlot()
