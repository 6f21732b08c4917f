"""The broker's part in the quota: messages in, messages out, around a pool of slots."""

from __future__ import annotations

from common import messages as m
from common.quota import USE_GRANT_WITHIN_S, Reply, SlotPool

MAX_SLOT_REQUESTS = 4096  # of one peer, waiting
RENEW_CLOSURE_S = 1.0  # a quota that is kept closed opens by itself so long after it was last told to stay closed


class QuotaDesk:
    """pool: None in a run without a quota, where nobody is to ask for slots."""

    def __init__(self, pool: SlotPool | None) -> None:
        self.pool = pool
        self._waits_for = ("", float("-inf"))  # why it is kept closed, and until when

    def handle(self, peer: str, message: m.SlotRequest | m.SlotReplied | m.SlotThrottled, now: float) -> None:
        """Apply one message of a rewarder.

        Raises:
            MessageError: it asks for slots where there are none, or for too many at once.
        """
        match message:
            case m.SlotRequest(request):
                self._request(peer, request, now)
            case m.SlotReplied():
                self._replied(peer, message, now)
            case m.SlotThrottled(retry_after_s, refused):
                if self.pool is not None:
                    self.pool.throttled(retry_after_s, now, refused)
                    self._waits_for = ("the service, which asked for a pause", now + retry_after_s)

    def heard(self, peer: str) -> None:
        """A peer is alive."""
        if self.pool is not None:
            self.pool.heard(peer)

    def leave(self, peer: str) -> None:
        """A peer is gone; what it may still send upstream stays counted."""
        if self.pool is not None:
            self.pool.leave(peer)

    def undelivered(self, grant: m.SlotGrant, now: float) -> None:
        """A grant was not sent at all, so that it will not be used."""
        if self.pool is not None:
            self.pool.replied(grant.slot, grant.grant, now, Reply(unused=True))

    def keep_closed(self, for_s: float, why: str, now: float) -> None:
        """Grant no slot for now; to be said again within `RENEW_CLOSURE_S`, however long it lasts (`for_s`)."""
        if self.pool is not None and for_s > 0:
            until = now + min(for_s, RENEW_CLOSURE_S)
            self.pool.close(until)
            self._waits_for = (why, until)

    def next_event(self) -> float | None:
        """When `outgoing` may have something by itself."""
        return self.pool.next_event() if self.pool is not None else None

    def outgoing(self, now: float) -> list[tuple[str, m.SlotGrant]]:
        """Grants that are due, each with its rewarder."""
        grants = self.pool.grant(now) if self.pool is not None else []
        return [
            (slot.worker, m.SlotGrant(slot.request, slot.slot, slot.grant, USE_GRANT_WITHIN_S, slot.waited_s))
            for slot in grants
        ]

    def waits_for(self, now: float) -> str:
        """Why nothing is granted for now; "" where it is."""
        why, until = self._waits_for
        return why if now < until else ""

    def _request(self, peer: str, request: int, now: float) -> None:
        if self.pool is None:
            raise m.MessageError("this run has no quota: search.quota is not set")
        if self.pool.waiting_of(peer) >= MAX_SLOT_REQUESTS:
            raise m.MessageError(f"{MAX_SLOT_REQUESTS} slot requests wait already: wait for their answers")
        self.pool.request(peer, request, now)

    def _replied(self, peer: str, message: m.SlotReplied, now: float) -> None:
        if self.pool is None or self.pool.worker_of(message.slot) != peer:
            return
        reply = Reply(message.limit, message.remaining, message.sent_after_s, message.took_s, message.unused)
        self.pool.replied(message.slot, message.grant, now, reply)
