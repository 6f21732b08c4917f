"""What the faults of all services share: which requests fail, and the ways that do not depend on the service."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar, cast

from aiohttp import web

_MAY_NAME_A_WAIT = (403, 429, 503)

Answer = Callable[[], Awaitable[web.Response]]
KindT = TypeVar("KindT", bound=Enum)


@dataclass(frozen=True, slots=True)
class Fault(Generic[KindT]):
    """A fault to be. `detail` in [0, 1) chooses among its variants, e.g. where an answer is cut."""

    kind: KindT
    detail: float


@dataclass(frozen=True, slots=True)
class Outage:
    """A stretch in which every request fails: `lasts_s` seconds, from `at_s` seconds after the server's start."""

    at_s: float
    lasts_s: float

    def covers(self, elapsed_s: float) -> bool:
        """Whether it is on, so many seconds after the start."""
        return self.at_s <= elapsed_s < self.at_s + self.lasts_s


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """When requests fail.

    Args:
        rate: share of requests that fail.
        late_s: seconds before a late answer leaves; longer than any client should wait.
        outage: None for none.
        retry_after_s: Retry-After of the faults under status 403, 429 and 503; None for no such header.
    """

    rate: float = 0.0
    seed: int = 0
    late_s: float = 60.0
    outage: Outage | None = None
    retry_after_s: float | None = None


class FaultSequence(Generic[KindT]):
    """Decides which requests fail, and how: the same sequence for the same seed, in order of arrival.

    Args:
        kinds: the ways in which the service fails; their values are their names in `/health`. Those called CLOSED,
            RESET and LATE are the same at every service (`_fail`).
        pages: status and HTML of the faults that are a page.
    """

    def __init__(self, kinds: type[KindT], pages: Mapping[KindT, tuple[int, str]], plan: FaultPlan) -> None:
        self._kinds = list(kinds)
        self._pages = pages
        self._plan = plan
        self._random = random.Random(plan.seed)
        self.counts: Counter[str] = Counter()

    def draw(self, elapsed_s: float) -> Fault[KindT] | None:
        """The fate of the next request: None if it is answered properly.

        Args:
            elapsed_s: seconds since the server's start.
        """
        outage = self._plan.outage
        down = outage is not None and outage.covers(elapsed_s)
        if self._random.random() >= self._plan.rate and not down:
            return None
        fault = Fault(self._random.choice(self._kinds), self._random.random())
        self.counts[fault.kind.value] += 1
        return fault

    async def _fail(self, fault: Fault[KindT], request: web.Request, answer: Answer) -> web.Response:
        """Fail `request` in a way that does not depend on the service; `answer` gives what would have been said."""
        match fault.kind.name:
            case "CLOSED":
                return closed(request)
            case "RESET":
                return reset(request)
            case "LATE":
                await asyncio.sleep(self._plan.late_s)
                return await answer()
        return self._page(fault.kind)

    def _page(self, kind: KindT) -> web.Response:
        return self._failure(*self._pages[kind])

    def _failure(self, status: int, text: str, content_type: str = "text/html") -> web.Response:
        """A fault that is a whole answer."""
        wait = self._plan.retry_after_s
        headers = {"Retry-After": f"{wait:g}"} if wait is not None and status in _MAY_NAME_A_WAIT else {}
        return web.Response(status=status, text=text, headers=headers, content_type=content_type, charset="UTF-8")


def cut_short(response: web.Response, detail: float) -> web.Response:
    """The answer without its end: at least its first character, never its last."""
    text = cast(str, response.text).rstrip()
    kept = 1 + int(detail * (len(text) - 1))
    return web.Response(text=text[:kept], content_type=response.content_type, charset="UTF-8")


def closed(request: web.Request) -> web.Response:
    """Cut the connection. The response returned is for the framework and goes nowhere."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response()


def reset(request: web.Request) -> web.Response:
    """Cut the connection as a peer does that knows nothing of it: by a RST, because of a linger time of 0."""
    if request.transport is not None:
        peer = request.transport.get_extra_info("socket")
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return closed(request)
