"""Bootstrap confidence intervals for means over queries (Efron and Tibshirani 1993, chapter 13:
percentile method).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

# Resamples are drawn in blocks so that memory stays at some 10 MB whatever the number of values.
_BLOCK_ELEMENTS = 1_000_000


class Interval(NamedTuple):
    """A mean with the bounds of its confidence interval."""

    mean: float
    low: float
    high: float

    def clear_of(self, other: Interval) -> bool:
        """True if the two intervals do not touch."""
        return self.low > other.high or other.low > self.high


def bootstrap_interval(
    values: Sequence[float] | npt.NDArray[np.floating],
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of the mean of `values` (one per query, any order).

    The same seed gives the same interval. Raises ValueError for no values, values that are not finite, or
    a confidence outside (0, 1).
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or sample.size == 0 or not np.isfinite(sample).all():
        raise ValueError("a bootstrap needs a flat list of at least one finite value")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    means = _resampled_means(sample, resamples, np.random.default_rng(seed))
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return Interval(float(sample.mean()), float(low), float(high))


def paired_bootstrap_difference(
    values: Sequence[float] | npt.NDArray[np.floating],
    baseline: Sequence[float] | npt.NDArray[np.floating],
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Interval of mean(values - baseline), where entry i of both belongs to the same query.

    Pairing removes the spread between easy and hard queries; an interval that leaves out 0 means a real
    difference. Raises ValueError if the lengths differ, and as `bootstrap_interval`.
    """
    first = np.asarray(values, dtype=np.float64)
    second = np.asarray(baseline, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"paired values must match query by query, got {first.size} and {second.size}")
    return bootstrap_interval(first - second, confidence=confidence, resamples=resamples, seed=seed)


def _resampled_means(
    sample: npt.NDArray[np.float64], resamples: int, rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Means of `resamples` draws with replacement, shape (resamples,)."""
    block = max(1, _BLOCK_ELEMENTS // sample.size)
    means = np.empty(resamples, dtype=np.float64)
    for start in range(0, resamples, block):
        stop = min(start + block, resamples)
        chosen = rng.integers(0, sample.size, size=(stop - start, sample.size))
        means[start:stop] = sample[chosen].mean(axis=1)
    return means
