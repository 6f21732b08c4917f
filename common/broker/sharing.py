"""The broker's part in sharing search results: messages in, messages out, around a `SharedCache`."""

from __future__ import annotations

from common import cache_messages as c
from common import messages as m
from common.shared_cache import Promoted, SharedCache, Told

PROMISE_S = 15.0  # who fetches a result for all says within this time that it still does

ToSend = tuple[str, m.AnyFromBroker, m.Payload]


class Sharing:
    """Answers gather until `outgoing` takes them, because a peer that leaves makes some too."""

    def __init__(self, max_bytes: int, now: float) -> None:
        self.cache = SharedCache(PROMISE_S, max_bytes)
        self._now = now
        self._outbox: list[ToSend] = []

    def handle(self, peer: str, message: c.CacheToBroker, payload: m.Payload, now: float) -> None:
        """Apply one message of a rewarder.

        Raises:
            MessageError: a result that is none, or too large.
        """
        self._now = now
        match message:
            case c.CacheGet(key):
                self._get(peer, key)
            case c.CachePut(key):
                self._put(peer, key, payload)
            case c.CacheFailed(key):
                self._promote(self.cache.failed(key, peer, now))
            case c.CacheRenew(keys):
                for key in keys:
                    self.cache.renew(key, peer, now)

    def leave(self, peer: str) -> None:
        """A peer is gone."""
        self._promote(self.cache.leave(peer, self._now))

    def outgoing(self, now: float) -> list[ToSend]:
        """What is to be sent, expired promises included."""
        self._now = now
        self._promote(self.cache.expire(now))
        outbox, self._outbox = self._outbox, []
        return outbox

    def next_event(self) -> float | None:
        """When `outgoing` has something by itself."""
        return self._now if self._outbox else self.cache.next_event()

    def _get(self, peer: str, key: bytes) -> None:
        answer = self.cache.get(key, peer, self._now)
        match answer:
            case Told.FETCH:
                self._send(peer, c.CacheFetch(key, self.cache.promise_s))
            case Told.ALONE:
                self._send(peer, c.CacheFetch(key, 0.0))
            case Told.WAIT:
                self._send(peer, c.CacheWait(key, self.cache.promise_s))
            case result:
                self._send(peer, c.CacheValue(key), [result])

    def _put(self, peer: str, key: bytes, payload: m.Payload) -> None:
        if len(payload) != 1 or not 0 < len(payload[0]) <= c.MAX_RESULT_BYTES:
            sizes = [len(frame) for frame in payload[:10]]
            raise m.MessageError(f"a shared result is one frame of 1 to {c.MAX_RESULT_BYTES} bytes, not {sizes}")
        result = bytes(memoryview(payload[0]))  # a copy: the frame would hold on to what else arrived with it
        for waiter in self.cache.put(key, result, peer):
            self._send(waiter, c.CacheValue(key), [result])

    def _promote(self, promoted: list[Promoted]) -> None:
        for peer, key in promoted:
            self._send(peer, c.CacheFetch(key, self.cache.promise_s))

    def _send(self, peer: str, message: m.AnyFromBroker, payload: m.Payload = ()) -> None:
        self._outbox.append((peer, message, payload))
