"""Dates, numbers and ages as numbers that can be compared, read as the service writes them and as queries do."""

from __future__ import annotations

import calendar
import math
import re
from datetime import date

from rewarders.servers.ctgov.areas import Kind

_ISO_DATE = re.compile(r"(\d{4})(?:[-/](\d{1,2})(?:[-/](\d{1,2}))?)?", re.ASCII)
_US_DATE = re.compile(r"(\d{1,2})/(\d{1,2})/(\d{4})", re.ASCII)
_NUMBER = re.compile(r"[+-]?\d{1,15}(?:\.\d{1,15})?", re.ASCII)
_AGE = re.compile(r"(\d{1,6}(?:\.\d{1,6})?)\s*(year|month|week|day|hour|minute)s?", re.ASCII | re.IGNORECASE)
_DAYS = {"year": 365.25, "month": 30.4375, "week": 7.0, "day": 1.0, "hour": 1 / 24, "minute": 1 / 1440}

Span = tuple[float, float]


def span_of(text: str, kind: Kind) -> Span | None:
    """The smallest and largest number that a value may stand for: the days of `2012-05`, twice the same number for
    most else. Days are numbered as `date.toordinal` does, ages are in days. None if the text is no such value."""
    text = text.strip()
    if kind is Kind.DATE:
        return _days(text)
    if kind is Kind.NUMBER:
        return (float(text), float(text)) if _NUMBER.fullmatch(text) else None
    age = _AGE.fullmatch(text)
    if age is None:
        return None
    days = float(age[1]) * _DAYS[age[2].lower()]
    return days, days


def bound_of(text: str, kind: Kind, *, upper: bool) -> float | None:
    """One end of a RANGE: MIN, MAX or a value; the upper bound `2012-05` is the last day of May."""
    text = text.strip()
    if text in ("MIN", "MAX"):
        return math.inf if text == "MAX" else -math.inf
    span = span_of(text, kind)
    return span[upper] if span else None


def _days(text: str) -> Span | None:
    """First and last day of a year, month or day."""
    us, iso = _US_DATE.fullmatch(text), _ISO_DATE.fullmatch(text)
    if us:
        written = [us[3], us[1], us[2]]
    elif iso:
        written = [part for part in iso.groups() if part]
    else:
        return None
    parts = [int(part) for part in written]
    try:
        first = date(*[*parts, 1, 1][:3])
        if len(parts) == 3:
            last = first
        elif len(parts) == 2:
            last = first.replace(day=calendar.monthrange(*parts)[1])
        else:
            last = first.replace(month=12, day=31)
    except ValueError:
        return None
    return float(first.toordinal()), float(last.toordinal())
