"""Quota slots that come nearer to N / W than completion-anchored ones, by what the service itself says of its counter.

`common.quota.SlotPool` pays W + RTT for every request, because it cannot know when within its round trip a request
was counted. Most of a round trip is the service at work, after it has counted; this pool frees a slot `W + margin`
after the request was *sent*, once the service's own X-RateLimit headers have shown that sends and arrivals agree:

* It begins strict, and keeps an account of all requests: a window of W + 2·margin around each send bounds what the
  service can have counted, if requests arrive within `margin` of each other's travel time. Each answer says what it did
  count (Limit - Remaining). More than the account allows is a *surprise*: requests bunch up on their way, or somebody
  else uses the same key. `CALM_REPLIES` answers in a row without surprise earn trust; a surprise ends it. Fixed
  windows, a sliding log and GCRA with a burst of N all count at most what a sliding window does, so the test needs no
  knowledge of which it is.
* An answer that took longer than usual (beyond the quantile `USUAL` of what the fastest took) may have been late on its
  way there: its slot is freed W after the latest instant at which it can have arrived (answer - fastest round trip).
* A request without an answer keeps its slot as long as the slowest of the recent answers took, and half as long again.
* A refusal (429) ends trust: strict for `BACK_OFF_S` at least and until the answers are calm again, then with a
  quarter more margin. Refusals have a budget, `1 + REFUSED_SHARE · granted`: beyond it there is no trust.
* A lower X-RateLimit-Limit than the configured N lowers the number of slots; a higher one does not raise it.

Guarantee: at most `2 + REFUSED_SHARE · granted` refusals that trust can be blamed for, not counting requests that were
under way already when one was heard of; while there is no trust, and without the headers there never is any, slots are
freed as `SlotPool` frees them. There is no promise of "never more than N in any window": `strict` is for that. All
workers are taken to be about equally far from the service; where they are not, surprises keep the pool strict.

A slot is never free before its answer, so N / RTT bounds the rate of a service slower than W.
"""

from __future__ import annotations

import math
from collections import deque

from common.quota import NO_NEWS, USE_GRANT_WITHIN_S, Reply, SlotPool

CALM_REPLIES = 30
MARGIN = 0.02  # of a window
MAX_MARGIN = 0.1
WIDEN = 1.25  # of the margin, after a refusal: jitter's tail is steep, a little more of it makes refusals rare
USUAL = 0.98
BACK_OFF_S = 5.0
REFUSED_SHARE = 0.0005
REMEMBERED = 256  # round trips


class AdaptivePool(SlotPool):
    """N slots, send-anchored while the service's own account agrees with ours. Times as in `SlotPool`."""

    def __init__(
        self,
        slots: int,
        window_s: float,
        hard_deadline_s: float,
        now: float,
        quarantine: bool = True,
        first_grant: int = 1,
    ) -> None:
        super().__init__(slots, window_s, hard_deadline_s, now, quarantine, first_grant)
        self.surprises = 0
        self._withheld: set[int] = set()  # slots beyond the service's own limit
        self._margin_s = MARGIN * window_s
        self._round_trips: deque[float] = deque(maxlen=REMEMBERED)
        self._arrivals: deque[tuple[float, float]] = deque()  # earliest and latest instant, less the way there
        self._calm = 0
        self._distrusted_until = now

    def phase(self, now: float) -> str:
        return "adaptive" if self.trusted(now) else "adaptive, strict for now"

    def trusted(self, now: float) -> bool:
        """Whether slots are anchored to sends."""
        within_budget = self.refused <= 1 + REFUSED_SHARE * self.granted
        return self._calm >= CALM_REPLIES and now >= self._distrusted_until and within_budget

    def throttled(self, for_s: float, now: float, refused: bool = True) -> None:
        super().throttled(for_s, now, refused)
        if refused:
            self._calm = 0
            self._distrusted_until = now + BACK_OFF_S
            self._margin_s = min(WIDEN * self._margin_s, MAX_MARGIN * self._window_s)

    def replied(self, slot: int, grant: int, now: float, reply: Reply = NO_NEWS) -> bool:
        known = super().replied(slot, grant, now, reply)
        if known and reply.limit is not None:
            self._obey(max(1, min(reply.limit, len(self._grant_of))), now)
        return known

    # ------------------------------------------------------------------ inside

    def _free_after(self, slot: int, now: float, reply: Reply) -> float:
        granted_at = self._granted_at[slot]
        if reply.took_s is None or reply.sent_after_s is None:
            self._arrivals.append((granted_at, now))
            return now + self._window_s
        sent = min(granted_at + reply.sent_after_s, now)
        late = self._lateness(min(reply.took_s, now - sent))
        self._arrivals.append((sent, sent + late))
        self._judge(sent, now, reply)
        if not self.trusted(now):
            return now + self._window_s
        return max(now, sent + late + self._window_s + self._margin_s)

    def _hold(self, now: float) -> float:
        if not self.trusted(now):
            return self._hold_s
        return min(self._hold_s, USE_GRANT_WITHIN_S + 1.5 * max(self._round_trips) + self._window_s)

    def _lateness(self, took_s: float) -> float:
        """Seconds by which a request may have arrived later than the fastest, 0 for a usual answer."""
        self._round_trips.append(took_s)
        ordered = sorted(self._round_trips)
        usual = ordered[math.ceil(USUAL * len(ordered)) - 1]
        excess = took_s - ordered[0]
        return 0.0 if excess <= min(usual - ordered[0], self._window_s / 2) else excess

    def _judge(self, sent: float, now: float, reply: Reply) -> None:
        """Compare what the service counted with what can have arrived."""
        if reply.limit is None or reply.remaining is None:
            self._calm = max(0, self._calm - 1)
            return
        counted = reply.limit - reply.remaining
        if counted > self._most_in_window(sent, now):
            self.surprises += 1
            self._calm = 0
        else:
            self._calm = min(2 * CALM_REPLIES, self._calm + 1)

    def _most_in_window(self, end: float, now: float) -> int:
        """The most arrivals that a window of W that ends at about `end` can hold."""
        while self._arrivals and self._arrivals[0][1] < now - self._hold_s - self._window_s:
            self._arrivals.popleft()
        first, last = end - self._window_s - self._margin_s, end + self._margin_s
        answered = sum(earliest <= last and latest > first for earliest, latest in self._arrivals)
        return answered + sum(self._granted_at[slot] <= last for slot in self._out)

    def _obey(self, limit: int, now: float) -> None:
        """Use as many slots as the service's own limit has."""
        while self._withheld and len(self._grant_of) - len(self._withheld) < limit:
            self._schedule(self._withheld.pop(), now + self._window_s)
        for slot, free_at in enumerate(self._free_at):
            if len(self._grant_of) - len(self._withheld) <= limit:
                break
            if slot not in self._out and slot not in self._withheld and free_at < math.inf:
                self._withheld.add(slot)
                self._schedule(slot, math.inf)
