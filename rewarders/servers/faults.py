"""What the faults of all services share: which requests fail, and the ways that do not depend on the service."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar, cast

from aiohttp import web

Answer = Callable[[], Awaitable[web.Response]]
KindT = TypeVar("KindT", bound=Enum)


@dataclass(frozen=True, slots=True)
class Fault(Generic[KindT]):
    """A fault to be. `detail` in [0, 1) chooses among its variants, e.g. where an answer is cut."""

    kind: KindT
    detail: float


class FaultSequence(Generic[KindT]):
    """Decides which requests fail, and how: the same sequence for the same seed, in order of arrival.

    Args:
        kinds: the ways in which the service fails; their values are their names in `/health`.
        rate: share of requests that fail.
        late_s: seconds before a late answer leaves; longer than any client should wait.
    """

    def __init__(self, kinds: type[KindT], rate: float, seed: int, late_s: float) -> None:
        self._kinds = list(kinds)
        self._rate = rate
        self._random = random.Random(seed)
        self._late_s = late_s
        self.counts: Counter[str] = Counter()

    def draw(self) -> Fault[KindT] | None:
        """The fate of the next request: None if it is answered properly."""
        if self._random.random() >= self._rate:
            return None
        fault = Fault(self._random.choice(self._kinds), self._random.random())
        self.counts[fault.kind.value] += 1
        return fault


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
