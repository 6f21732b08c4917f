"""The figures of `benchmarks.quota` from what was measured."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from benchmarks.quota import figures, missed, most_in_any_window
from benchmarks.quota_server import Tally

SECOND = 1_000_000_000


def arguments(mode: str) -> argparse.Namespace:
    return argparse.Namespace(mode=mode, counter="all", limit=10, window=1.0, seconds=10.0)


def result(mode: str, per_s: float, refused: int = 0) -> dict[str, Any]:
    times = [round(SECOND * (5 + number / per_s)) for number in range(round(10 * per_s))]
    tally = Tally(arrivals=times, admitted=times, refused_at=times[:refused], round_trips=[0.25])
    return figures(arguments(mode), tally, [0.25, 0.25, 9.0], 5 * SECOND)


def test_a_window_is_half_open() -> None:
    assert most_in_any_window([0, 5, 10], 10) == 2
    assert most_in_any_window([0, 5, 9], 10) == 3
    assert most_in_any_window([3, 1, 2], 1) == 1
    assert most_in_any_window([], 10) == 0


def test_strict_is_measured_against_what_round_trips_allow() -> None:
    one = result("strict", 8.0)
    assert one["bound"] == pytest.approx(8.0)
    assert one["of_bound"] == pytest.approx(1.0)
    assert one["utilisation"] == pytest.approx(0.8)
    assert missed(one) == []
    assert missed(result("strict", 7.5)) == ["too little granted"]
    assert missed(result("strict", 8.0, refused=1)) == ["refusals"]
    assert "above the limit" in missed(result("strict", 20.0))


def test_adaptive_is_measured_against_the_limit() -> None:
    assert missed(result("adaptive", 9.6)) == []
    assert missed(result("adaptive", 9.4)) == ["too little granted"]
    assert missed(result("adaptive", 9.6, refused=1)) == ["refusals"]
