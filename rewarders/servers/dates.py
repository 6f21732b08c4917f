"""Publication dates as integers YYYYMMDD, and the ranges that PubMed's date syntax denotes."""

from __future__ import annotations

import re
from datetime import date, timedelta

_DATE = re.compile(r"(\d{4})(?:[/-](\d{1,2})(?:[/-](\d{1,2}))?)?")

# Corpora without dates get made-up ones between these days, in the order of the file: its last document is
# the newest.
NEWEST_MADE_UP_DATE = date(2020, 12, 31)
OLDEST_MADE_UP_DATE = date(1971, 1, 1)


def date_range(text: str) -> tuple[int, int] | None:
    """First and last day, both as YYYYMMDD, of `YYYY`, `YYYY/MM`, `YYYY/MM/DD` or of two of them around a
    colon.

    Returns None where the text is no date. A day past the end of its month is accepted, as comparisons need
    no more.
    """
    first, colon, last = text.partition(":")
    start = _days(first)
    end = _days(last) if colon else start
    if start is None or end is None:
        return None
    return start[0], end[1]


def _days(text: str) -> tuple[int, int] | None:
    """First and last day of one year, month or day."""
    match = _DATE.fullmatch(text.strip())
    if match is None:
        return None
    month, day = (int(part) if part else None for part in match.groups()[1:])
    if (month is not None and not 1 <= month <= 12) or (day is not None and not 1 <= day <= 31):
        return None
    first = int(match[1]) * 10_000 + (month or 1) * 100 + (day or 1)
    last = int(match[1]) * 10_000 + (month or 12) * 100 + (day or 31)
    return first, last


def made_up_date(position: int, total: int) -> int:
    """A date as YYYYMMDD for document `position` (0-based, oldest first) of `total` undated ones."""
    span = (NEWEST_MADE_UP_DATE - OLDEST_MADE_UP_DATE).days
    day = OLDEST_MADE_UP_DATE + timedelta(days=span * position // max(total, 1))
    return day.year * 10_000 + day.month * 100 + day.day


def written_date(day: int) -> str:
    """YYYYMMDD as PubMed prints it in translations: `YYYY/MM/DD`."""
    return f"{day // 10_000:04d}/{day // 100 % 100:02d}/{day % 100:02d}"
