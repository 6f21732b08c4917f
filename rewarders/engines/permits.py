"""Permits to send one request upstream, and what the quota hears of the answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from types import SimpleNamespace
from typing import Final, Protocol, Self

import aiohttp

from rewarders.engines.base import EngineThrottled, EngineUnavailable
from rewarders.engines.verdicts import DEFAULT_RETRY_AFTER_S, retry_after_seconds

_MAX_RATE: Final = 1_000_000


class Slot(Protocol):
    """A grant to send one request."""

    @property
    def number(self) -> int:
        """Of the slot, from 0. Slots whose numbers leave the same rest by k are one of k equal shares of the quota."""

    def sent(self) -> None:
        """Called right before the request's bytes go to the kernel; the last call counts."""

    def replied(self, limit: int | None = None, remaining: int | None = None) -> None:
        """Called at the first bytes of the reply: from here on the slot may be counted as used up.

        limit, remaining: the X-RateLimit headers of the reply.
        """

    def throttled(self, retry_after_s: float, refused: bool = True) -> None:
        """The upstream asks everybody to pause. refused: it turned the request away for the quota."""

    def unused(self) -> None:
        """Nothing was sent, and nothing will be."""


Permit = Callable[[], AbstractAsyncContextManager[Slot]]


class _FreeSlot:
    """A permit and the slot it gives, in one: there is nothing to take or to give back."""

    number = 0

    def sent(self) -> None:
        pass

    def replied(self, limit: int | None = None, remaining: int | None = None) -> None:
        pass

    def throttled(self, retry_after_s: float, refused: bool = True) -> None:
        pass

    def unused(self) -> None:
        pass

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass


_FREE: Final = _FreeSlot()


def unlimited() -> AbstractAsyncContextManager[Slot]:
    """The permit of an engine without a quota."""
    return _FREE


def sending_trace() -> aiohttp.TraceConfig:
    """For sessions whose requests are made with `trace_request_ctx=slot`: tells the slot when they are written.

    Between the grant and that moment may lie a connection to open, or other work of the process.
    """

    async def written(_session: aiohttp.ClientSession, context: SimpleNamespace, _parameters: object) -> None:
        slot: Slot | None = context.trace_request_ctx
        if slot is not None:
            slot.sent()

    trace = aiohttp.TraceConfig()
    trace.on_request_headers_sent.append(written)
    trace.on_request_chunk_sent.append(written)
    return trace


def head_arrived(
    slot: Slot, status: int, headers: Mapping[str, str], default_wait_s: float = DEFAULT_RETRY_AFTER_S
) -> None:
    """Tell the quota what status and headers of a reply say. To be called before its body is read.

    headers: looked up case-insensitively if the mapping does so, as aiohttp's does. default_wait_s: the pause after
    a 429 that names none.
    """
    slot.replied(_rate(headers.get("X-RateLimit-Limit")), _rate(headers.get("X-RateLimit-Remaining")))
    wait = retry_after_seconds(headers.get("Retry-After"))
    if status == 429:
        slot.throttled(default_wait_s if wait is None else wait)
    elif wait is not None:
        slot.throttled(wait, refused=False)


def body_refused(slot: Slot, status: int, error: EngineUnavailable) -> None:
    """Tell the quota of a refusal that only the body of a reply shows: NCBI has sent some under status 200."""
    if isinstance(error, EngineThrottled) and status != 429:
        slot.throttled(DEFAULT_RETRY_AFTER_S if error.retry_after_s is None else error.retry_after_s)


def _rate(value: str | None) -> int | None:
    """A number of requests; None if the header is missing or says something else."""
    if value is None or not value.strip().isascii() or not value.strip().isdigit() or len(value.strip()) > 7:
        return None
    return min(int(value), _MAX_RATE)
