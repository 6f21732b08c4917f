"""Where a run's figures go: metrics.jsonl, samples.jsonl, W&B, the live terminal and summary.json."""

from __future__ import annotations

from common.tracking.metrics_log import MetricsLog, read_metrics
from common.tracking.progress import LiveProgress
from common.tracking.samples_log import SamplesLog, read_samples
from common.tracking.tracker import Tracker

__all__ = ["LiveProgress", "MetricsLog", "SamplesLog", "Tracker", "read_metrics", "read_samples"]
