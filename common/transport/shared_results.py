"""A rewarder's side of sharing search results through the broker (see `common.cache_messages`).

It never fails: where the broker is silent, slow or new, the answer is to fetch oneself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from common import cache_messages as c
from common import messages as m

ANSWER_WITHIN_S = 5.0  # the broker answers at once; after so long it is not waited for

Send = Callable[[m.AnyToBroker, m.Payload], None]


@dataclass
class _Ask:
    """Somebody waits for the broker to say what is to be done about a key."""

    answer: asyncio.Future[bytes | None]
    patience: asyncio.Timeout
    ask_again_at: float = float("inf")  # seconds of the event loop's clock


class SharedResults:
    """Asks for results and keeps promises. One question per key at a time; for one event loop.

    send: hands a message to the broker.
    """

    def __init__(self, send: Send, answer_within_s: float = ANSWER_WITHIN_S) -> None:
        self._send = send
        self._answer_within_s = answer_within_s
        self._asks: dict[bytes, _Ask] = {}
        self._promises: dict[bytes, tuple[float, float]] = {}  # key: seconds it lasts, time to renew it

    async def get(self, key: bytes) -> bytes | None:
        """The result under `key`, perhaps after another rewarder has fetched it.

        None: fetch it, then call `put` or `failed`, whatever happens.
        """
        if key in self._asks or key in self._promises:
            return None
        try:
            async with asyncio.timeout(self._answer_within_s) as patience:
                ask = self._asks[key] = _Ask(asyncio.get_running_loop().create_future(), patience)
                self._send(c.CacheGet(key), ())
                return await ask.answer
        except TimeoutError:
            self._promises[key] = (0.0, float("inf"))  # should the broker say "fetch" late, that is under way
            return None
        except asyncio.CancelledError:
            self.failed(key)
            raise
        finally:
            self._asks.pop(key, None)

    def put(self, key: bytes, payload: bytes) -> None:
        """The result that was fetched, for everybody."""
        self._promises.pop(key, None)
        if len(payload) <= c.MAX_RESULT_BYTES:
            self._send(c.CachePut(key), [payload])
        else:
            self._send(c.CacheFailed(key), ())

    def failed(self, key: bytes) -> None:
        """It was not fetched, or is not wanted any more."""
        self._promises.pop(key, None)
        self._send(c.CacheFailed(key), ())

    # ------------------------------------------------------------------ for the client

    def handle(self, message: c.CacheFromBroker, payload: list[memoryview]) -> None:
        """A message of the broker."""
        key, now = message.key, asyncio.get_running_loop().time()
        ask = self._asks.get(key)
        match message:
            case c.CacheValue():
                if ask is not None and not ask.answer.done():
                    ask.answer.set_result(bytes(payload[0]) if payload else None)
            case c.CacheFetch(_, within_s):
                self._told_to_fetch(key, within_s, ask, now)
            case c.CacheWait(_, within_s):
                if ask is not None and not ask.answer.done() and not ask.patience.expired():
                    ask.ask_again_at = now + within_s
                    ask.patience.reschedule(now + within_s + self._answer_within_s)

    def beat(self) -> None:
        """Renew what is being fetched and ask again for what is waited for, where it is time; call it often."""
        now = asyncio.get_running_loop().time()
        due = [key for key, (_, renew_at) in self._promises.items() if renew_at <= now]
        for key in due:
            lasts_s = self._promises[key][0]
            self._promises[key] = (lasts_s, now + lasts_s / 3)
        for start in range(0, len(due), c.MAX_RENEWED):
            self._send(c.CacheRenew(tuple(due[start : start + c.MAX_RENEWED])), ())
        for key, ask in self._asks.items():
            if ask.ask_again_at <= now:
                ask.ask_again_at = float("inf")
                self._send(c.CacheGet(key), ())

    def welcomed(self) -> None:
        """The broker has forgotten what this peer asked for, or never knew."""
        for key in self._asks:
            self._send(c.CacheGet(key), ())

    def _told_to_fetch(self, key: bytes, within_s: float, ask: _Ask | None, now: float) -> None:
        if ask is not None and not ask.answer.done():
            ask.answer.set_result(None)
        elif key not in self._promises:
            self._send(c.CacheFailed(key), ())  # not wanted any more
            return
        self._promises[key] = (within_s, now + within_s / 3 if within_s else float("inf"))
