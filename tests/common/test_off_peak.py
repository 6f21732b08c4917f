"""NCBI's hours for large jobs, on ordinary days and when the clocks change."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.off_peak import is_open, next_open


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


@pytest.mark.parametrize(
    ("now", "opens"),
    [
        ("2026-01-14T04:59:59-05:00", "2026-01-14T04:59:59-05:00"),  # Wednesday, before it closes
        ("2026-01-14T05:00:00-05:00", "2026-01-14T21:00:00-05:00"),
        ("2026-01-14T20:59:59-05:00", "2026-01-14T21:00:00-05:00"),
        ("2026-01-14T21:00:00-05:00", "2026-01-14T21:00:00-05:00"),
        ("2026-07-15T12:00:00-04:00", "2026-07-15T21:00:00-04:00"),  # summer
        ("2026-07-18T12:00:00-04:00", "2026-07-18T12:00:00-04:00"),  # Saturday
        ("2026-07-17T20:59:00-04:00", "2026-07-17T21:00:00-04:00"),  # Friday
        ("2026-07-20T04:59:00-04:00", "2026-07-20T04:59:00-04:00"),  # Monday morning
        ("2026-07-20T05:00:00-04:00", "2026-07-20T21:00:00-04:00"),
        # The clocks go forward on Sunday 8 March 2026 at 02:00 (all open), so Monday closes an hour of UTC earlier.
        ("2026-03-06T09:59:00+00:00", "2026-03-06T09:59:00+00:00"),
        ("2026-03-06T10:00:00+00:00", "2026-03-07T02:00:00+00:00"),
        ("2026-03-08T07:30:00+00:00", "2026-03-08T07:30:00+00:00"),
        ("2026-03-09T08:59:00+00:00", "2026-03-09T08:59:00+00:00"),
        ("2026-03-09T09:00:00+00:00", "2026-03-10T01:00:00+00:00"),
        # And back on Sunday 1 November 2026.
        ("2026-10-30T09:00:00+00:00", "2026-10-31T01:00:00+00:00"),
        ("2026-11-01T06:30:00+00:00", "2026-11-01T06:30:00+00:00"),
        ("2026-11-02T09:59:00+00:00", "2026-11-02T09:59:00+00:00"),
        ("2026-11-02T10:00:00+00:00", "2026-11-03T02:00:00+00:00"),
    ],
)
def test_next_open(now: str, opens: str) -> None:
    assert next_open(at(now)) == at(opens)


@given(st.integers(0, 366 * 24 * 60))
def test_it_is_open_at_the_next_opening_and_not_a_minute_before(minutes: int) -> None:
    now = at("2026-01-01T00:00:00+00:00") + timedelta(minutes=minutes)
    opens = next_open(now)
    assert is_open(opens)
    assert (opens == now) == is_open(now)
    assert opens == now or not is_open(opens - timedelta(minutes=1))
    assert opens - now <= timedelta(hours=16)


def test_a_time_without_zone_is_refused() -> None:
    with pytest.raises(ValueError, match="zone"):
        is_open(datetime(2026, 1, 1))
