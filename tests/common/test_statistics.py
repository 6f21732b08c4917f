from __future__ import annotations

import numpy as np
import pytest

from common.statistics import Interval, bootstrap_interval, paired_bootstrap_difference


def test_interval_of_a_normal_sample_agrees_with_the_formula() -> None:
    sample = np.random.default_rng(3).normal(2.0, 1.0, size=400)
    interval = bootstrap_interval(sample)
    half = 1.96 * sample.std(ddof=0) / 20.0
    assert interval.mean == pytest.approx(sample.mean())
    assert interval.low == pytest.approx(sample.mean() - half, abs=0.01)
    assert interval.high == pytest.approx(sample.mean() + half, abs=0.01)


def test_coverage_of_the_true_mean_is_near_the_confidence() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for seed in range(300):
        sample = rng.binomial(1, 0.3, size=100)
        interval = bootstrap_interval(sample, confidence=0.9, resamples=500, seed=seed)
        hits += interval.low <= 0.3 <= interval.high
    assert 0.84 <= hits / 300 <= 0.95


def test_same_seed_same_interval_whatever_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    values = list(np.linspace(0, 1, 50))
    first = bootstrap_interval(values, seed=7)
    assert bootstrap_interval(values, seed=7) == first
    assert bootstrap_interval(values, seed=8) != first
    monkeypatch.setattr("common.statistics._BLOCK_ELEMENTS", 1_000)
    assert bootstrap_interval(values, seed=7) == first


def test_a_single_value_is_its_own_interval() -> None:
    assert bootstrap_interval([0.25]) == Interval(0.25, 0.25, 0.25)


def test_pairing_sees_a_small_steady_difference() -> None:
    difficulty = np.random.default_rng(0).uniform(0, 0.9, size=100)
    better = difficulty + 0.05
    difference = paired_bootstrap_difference(better, difficulty)
    assert difference.low == pytest.approx(0.05)
    assert difference.high == pytest.approx(0.05)
    assert not bootstrap_interval(better).clear_of(bootstrap_interval(difficulty))


def test_clear_of_is_symmetric() -> None:
    low, high, middle = Interval(0.2, 0.1, 0.3), Interval(0.6, 0.5, 0.7), Interval(0.4, 0.25, 0.55)
    assert low.clear_of(high)
    assert high.clear_of(low)
    assert not middle.clear_of(low)
    assert not high.clear_of(middle)


@pytest.mark.parametrize("values", [[], [float("nan")], [[0.1], [0.2]]])
def test_bad_values_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="at least one finite value"):
        bootstrap_interval(values)


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="confidence"):
        bootstrap_interval([0.1], confidence=1.0)
    with pytest.raises(ValueError, match="resamples"):
        bootstrap_interval([0.1], resamples=0)
    with pytest.raises(ValueError, match="query by query, got 2 and 1"):
        paired_bootstrap_difference([0.1, 0.2], [0.1])
