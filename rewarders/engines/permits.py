"""Leave to send one request upstream: where the quota enters the engines."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Final, Protocol, Self


class Slot(Protocol):
    """A grant to send one request."""

    def replied(self) -> None:
        """Called at the first bytes of the reply: from here on the slot may be counted as used up."""


Permit = Callable[[], AbstractAsyncContextManager[Slot]]


class _FreeSlot:
    """A permit and the slot it gives, in one: there is nothing to take or to give back."""

    def replied(self) -> None:
        pass

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass


_FREE: Final = _FreeSlot()


def unlimited() -> AbstractAsyncContextManager[Slot]:
    """The permit of an engine without a quota."""
    return _FREE
