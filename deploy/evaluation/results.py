"""The figures of an evaluation, from its records.

A request counts by the mean over its samples (mean@k) and by the best of them (best@k). An answer that breaks the
format, or whose query the engine refuses, has 0 of every quality metric; a request that could not be scored is in no
figure, and is counted apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Final

import msgspec

from common.statistics import Interval, bootstrap_interval, paired_bootstrap_difference
from deploy.evaluation.records import QueryRecord, SampleRecord

MOST_RESAMPLES: Final = 10_000
_DRAWS: Final = 10_000_000  # of all resamples of one metric: larger sets have narrower intervals and need fewer

Values = dict[str, float]  # by request


class Figure(msgspec.Struct, frozen=True):
    """A mean over requests with its 95 % bootstrap interval; queries: requests it is a mean of."""

    mean: float
    low: float
    high: float
    queries: int


class MethodResults(msgspec.Struct, frozen=True):
    """What one method achieved.

    Attributes:
        queries: requests that count.
        apart: reason -> requests that do not.
        metrics: name -> figure; reward, format and lengths too. Lengths are of the answers that could be read.
        best: quality metric -> figure of the best sample of each request; empty for one sample.
        invalid: reason -> samples.
        cut: samples that reached the longest length.
        calls: searches the engine was asked, retries included, up to the last record written.
        tokens: generated.
    """

    queries: int
    apart: dict[str, int]
    metrics: dict[str, Figure]
    best: dict[str, Figure]
    invalid: dict[str, int]
    samples: int
    cut: int
    calls: int
    tokens: int


class Results(msgspec.Struct, frozen=True):
    """All of an evaluation, as in results.json.

    Attributes:
        metric: the task's own.
        quality: all metrics of which more is better.
        methods: model first, then the baselines.
        differences: baseline -> quality metric -> model minus baseline over the requests both have.
    """

    model: str
    task: str
    engine: str
    split: str
    metric: str
    quality: list[str]
    samples: int
    temperature: float
    methods: dict[str, MethodResults]
    differences: dict[str, dict[str, Figure]]


def results_of_method(records: Sequence[QueryRecord], quality: Sequence[str]) -> MethodResults:
    """The figures of one method."""
    counted = [record for record in records if not record.apart]
    samples = [sample for record in counted for sample in record.samples]
    names = dict.fromkeys([*quality, "reward", *sorted({name for sample in samples for name in sample.metrics})])
    values = {name: values_of(counted, name, quality) for name in names}
    several = any(len(record.samples) > 1 for record in counted)
    best = {name: best_of(counted, name) for name in quality if several}
    return MethodResults(
        queries=len(counted),
        apart=dict(Counter(record.apart for record in records if record.apart)),
        metrics={name: figure(found) for name, found in values.items() if found},
        best={name: figure(found) for name, found in best.items() if found},
        invalid=dict(Counter(_reason(sample) for sample in samples if sample.kind == "invalid")),
        samples=len(samples),
        cut=sum(sample.cut for sample in samples),
        calls=sum(record.calls for record in records),
        tokens=sum(sample.tokens for record in records for sample in record.samples),
    )


def values_of(records: Sequence[QueryRecord], name: str, quality: Sequence[str]) -> Values:
    """Request -> mean of a metric over its samples; without the requests none of whose samples has it."""
    found = {record.id: _sample_values(record, name, name in quality) for record in records}
    return {key: fmean(values) for key, values in found.items() if values}


def best_of(records: Sequence[QueryRecord], name: str) -> Values:
    """Request -> its best sample's value of a quality metric."""
    return {record.id: max(_sample_values(record, name, True)) for record in records}


def differences(
    model: Sequence[QueryRecord], baseline: Sequence[QueryRecord], quality: Sequence[str]
) -> dict[str, Figure]:
    """Model minus baseline, request by request, over those that count for both."""
    found = {}
    for name in quality:
        ours, theirs = (
            values_of([record for record in records if not record.apart], name, quality)
            for records in (model, baseline)
        )
        both = [key for key in ours if key in theirs]
        if both:
            interval = paired_bootstrap_difference(
                [ours[key] for key in both], [theirs[key] for key in both], resamples=_resamples(len(both))
            )
            found[name] = _figure(interval, len(both))
    return found


def figure(values: Mapping[str, float]) -> Figure:
    """Mean and interval over requests. Raises ValueError for none."""
    interval = bootstrap_interval(list(values.values()), resamples=_resamples(len(values)))
    return _figure(interval, len(values))


def _figure(interval: Interval, queries: int) -> Figure:
    return Figure(interval.mean, interval.low, interval.high, queries)


def _resamples(values: int) -> int:
    return max(1000, min(MOST_RESAMPLES, _DRAWS // values))


def _sample_values(record: QueryRecord, name: str, quality: bool) -> list[float]:
    values = [_value(sample, name, quality) for sample in record.samples]
    return [value for value in values if value is not None]


def _value(sample: SampleRecord, name: str, quality: bool) -> float | None:
    if name == "reward":
        return sample.reward
    if quality:
        return sample.metrics.get(name, 0.0) if sample.kind == "scored" else 0.0
    return sample.metrics.get(name)


def _reason(sample: SampleRecord) -> str:
    """Without what the engine said, of which no two are the same."""
    return sample.reason.partition(":")[0]
