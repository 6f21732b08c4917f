"""What the readers of all services' answers share: the verdict that needs a canary, and Retry-After."""

from __future__ import annotations

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final

_RETRY_AFTER_BOUNDS_S: Final = (0.5, 60.0)


class Undecided(Exception):  # noqa: N818 (a verdict like `BadQuery` and `EngineUnavailable`)
    """The engine refused, and its words do not tell a wrong query from an outage."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def retry_after_seconds(value: str | None, now: datetime | None = None) -> float | None:
    """Seconds of a Retry-After header (a number or an HTTP date, RFC 9110 section 10.2.3), clamped to
    0.5-60 s.

    None if the header is missing or unreadable.
    """
    if not value:
        return None
    seconds = _seconds_of(value.strip(), now or datetime.now(UTC))
    if seconds is None or seconds != seconds:
        return None
    low, high = _RETRY_AFTER_BOUNDS_S
    return min(max(seconds, low), high)


def _seconds_of(value: str, now: datetime) -> float | None:
    try:
        return float(value)
    except ValueError:
        pass
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return (moment - now).total_seconds()
