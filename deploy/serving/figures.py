"""What Prometheus reads of the server; vLLM's own figures stand beside them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS: Final = (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120)


class ServerFigures:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        verdicts, outcomes = ["task", "verdict"], ["endpoint", "outcome"]
        self.rewrites = Counter("deepretrieval_rewrites", "Rewrites by verdict.", verdicts, registry=registry)
        self.searches = Counter("deepretrieval_searches", "Searches by verdict.", verdicts, registry=registry)
        self.tokens = Counter("deepretrieval_generated_tokens", "Tokens of rewrites.", ["task"], registry=registry)
        self._requests = Counter("deepretrieval_requests", "Requests by outcome.", outcomes, registry=registry)
        self._under_way = Gauge("deepretrieval_requests_under_way", "Now.", ["endpoint"], registry=registry)
        self._seconds = Histogram(
            "deepretrieval_request_seconds", "Seconds of a request.", ["endpoint"], registry=registry, buckets=_SECONDS
        )

    @contextlib.contextmanager
    def request(self, endpoint: str) -> Iterator[None]:
        """Around one request: it failed where it raises."""
        begun = time.perf_counter()
        outcome = "failed"
        with self._under_way.labels(endpoint).track_inprogress():
            try:
                yield
                outcome = "answered"
            finally:
                self._requests.labels(endpoint, outcome).inc()
                self._seconds.labels(endpoint).observe(time.perf_counter() - begun)
