"""The servers' counters: who is admitted, and what they say remains."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewarders.servers.quota import FixedWindow, Gcra, SlidingLog

COUNTERS = [FixedWindow, SlidingLog, Gcra]


@pytest.mark.parametrize("kind", COUNTERS)
def test_the_first_burst_is_admitted_and_remaining_counts_down(kind: type) -> None:
    counter = kind(3, 1.0)
    verdicts = [counter.admit(10.2) for _ in range(4)]
    assert [verdict.admitted for verdict in verdicts] == [True, True, True, False]
    assert [verdict.remaining for verdict in verdicts] == [2, 1, 0, 0]
    assert verdicts[3].count == 4


def test_they_differ_in_when_there_is_room_again() -> None:
    fixed, sliding, gcra = FixedWindow(2, 1.0), SlidingLog(2, 1.0), Gcra(2, 1.0)
    for counter in (fixed, sliding, gcra):
        assert counter.admit(0.8).admitted
        assert counter.admit(0.9).admitted
        assert not counter.admit(0.95).admitted
    assert fixed.admit(1.0).admitted, "a new window begins"
    assert not sliding.admit(1.75).admitted
    assert sliding.admit(1.8).admitted, "a window after the first"
    assert not gcra.admit(1.2).admitted
    assert gcra.admit(1.3).admitted, "half a window after the first: one of two has come back"


@given(st.lists(st.floats(0.0, 2.0), max_size=80), st.integers(1, 6), st.floats(0.1, 3.0))
def test_who_keeps_to_the_sliding_log_is_refused_by_none(gaps: list[float], limit: int, window_s: float) -> None:
    """So what is safe under a sliding log is safe under all three."""
    sliding, others, now = SlidingLog(limit, window_s), [FixedWindow(limit, window_s), Gcra(limit, window_s)], 100.0
    for gap in gaps:
        now += gap
        if sliding.admit(now).admitted:
            assert all(other.admit(now).admitted for other in others)
