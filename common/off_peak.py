"""NCBI's hours for large jobs: weekends, and 21:00 to 05:00 on weekdays, US Eastern time (NBK25497). Pure."""

from __future__ import annotations

from datetime import UTC, datetime, time
from functools import cache
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

ZONE = "America/New_York"
OPENS = time(21)
CLOSES = time(5)
WAITS_FOR = "NCBI's off-peak hours (from 21:00 US Eastern)"
_SATURDAY = 5


class TimeZoneMissingError(LookupError):
    """This machine has no time zone data; the message says what to install."""


def is_open(now: datetime) -> bool:
    """Whether large jobs may run. `now` must know its time zone."""
    local = _eastern(now)
    return local.weekday() >= _SATURDAY or not CLOSES <= local.time() < OPENS


def next_open(now: datetime) -> datetime:
    """The first moment from `now` on at which large jobs may run, in UTC."""
    if is_open(now):
        return now.astimezone(UTC)
    # Closed hours begin and end on one day, and clocks change on Sundays at 02:00, in open hours: wall time will do.
    return datetime.combine(_eastern(now).date(), OPENS, _zone()).astimezone(UTC)


def _eastern(now: datetime) -> datetime:
    if now.tzinfo is None:
        raise ValueError("a time without its zone says nothing about US Eastern time")
    return now.astimezone(_zone())


@cache
def _zone() -> ZoneInfo:
    try:
        return ZoneInfo(ZONE)
    except ZoneInfoNotFoundError:
        raise TimeZoneMissingError(
            f"no time zone data for {ZONE}: install the system's tzdata or `pip install tzdata`"
        ) from None
