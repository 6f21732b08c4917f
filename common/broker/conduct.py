"""How peers behave: bad frames are counted, and who sends several is not listened to for a while.

A source is the role of a key and a name, known or not: a name alone could be another role's, and a bad actor
must not get a learner banned. A `Hello` changes nothing here, or it would wipe the slate.

Invariants: a banned source is neither read nor answered until its ban is over; a source is sent at most
`bad_frames_allowed` protests while it is remembered, and asked who it is at most once per `ask_every_s`; at
most `remembered` sources are remembered, those heard of longest ago are forgotten first.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from common import messages as m

Source = tuple[m.Role, str]


@dataclass(slots=True)
class _Record:
    bad_frames: int = 0
    last_bad: float = 0.0
    protests: int = 0
    banned_until: float = 0.0
    asked_at: float | None = None


class Conduct:
    """Remembers sources that were unknown or sent bad frames. Times are seconds on the caller's monotonic clock.

    Args:
        bad_frames_allowed: bad frames before a ban; one is forgiven when none followed for `ban_s`.
        ban_s: seconds a ban lasts.
        ask_every_s: seconds between two answers to what an unknown source sends.
        remembered: sources remembered at most.
    """

    def __init__(self, bad_frames_allowed: int, ban_s: float, ask_every_s: float, remembered: int) -> None:
        self.bans = 0
        self._allowed = bad_frames_allowed
        self._ban_s = ban_s
        self._ask_every_s = ask_every_s
        self._remembered = remembered
        self._records: OrderedDict[Source, _Record] = OrderedDict()

    def __len__(self) -> int:
        return len(self._records)

    def banned(self, source: Source, now: float) -> bool:
        """Whether a frame of this source is to be dropped unread."""
        record = self._records.get(source)
        return record is not None and now < record.banned_until

    def bad_frame(self, source: Source, now: float) -> bool:
        """Count a bad frame. True if the source is banned for it."""
        record = self._record(source)
        if now - record.last_bad > self._ban_s:
            record.bad_frames = 0
        record.bad_frames += 1
        record.last_bad = now
        if record.bad_frames <= self._allowed:
            return False
        record.bad_frames = 0
        record.banned_until = now + self._ban_s
        self.bans += 1
        return True

    def may_protest(self, source: Source) -> bool:
        """Whether the source may be told once more what was wrong; counts as told."""
        record = self._record(source)
        record.protests += 1
        return record.protests <= self._allowed

    def may_ask(self, source: Source, now: float) -> bool:
        """Whether an unknown source may be asked now who it is; counts as asked."""
        record = self._record(source)
        if record.asked_at is not None and now - record.asked_at < self._ask_every_s:
            return False
        record.asked_at = now
        return True

    def _record(self, source: Source) -> _Record:
        record = self._records.pop(source, None) or _Record()
        self._records[source] = record
        if len(self._records) > self._remembered:
            self._records.popitem(last=False)
        return record
