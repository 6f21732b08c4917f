"""What every local search server does to its traffic: latency, a quota per client, and its settings."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from rewarders.servers.faults import FaultPlan, Outage
from rewarders.servers.hosting import SearchServerError
from rewarders.servers.quota import SlidingLog, Verdict

CLIENTS_KEPT = 10_000


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What to serve, and how like the real service it is.

    Args:
        corpus: folder of what is searched.
        port: 0 takes a free one.
        cache_folder: where indexes are kept; None for the user's cache folder.
        latency_ms, jitter_ms: each answer takes `latency_ms` plus uniformly 0 to `jitter_ms` milliseconds.
        quota, window_s: at most `quota` requests per client (its API key, where the service has keys, or its address)
            in any `window_s` seconds, others get status 429; None for no limit (and no rate headers).
        retry_after_s: value of a Retry-After header on 429, and on faults that may carry one; None for no such header,
            as seen from NCBI in 2026.
        seed: of the jitter.
        fault_rate: share of the requests that fail as they do at the service, 0 to below 1.
        fault_seed: of the sequence of faults.
        fault_late_s: seconds before a late answer, one of the faults, leaves.
        outage_at_s, outage_s: every request fails for `outage_s` seconds (0: never), from `outage_at_s` seconds after
            the start.
    """

    corpus: Path
    host: str = "127.0.0.1"
    port: int = 0
    cache_folder: Path | None = None
    latency_ms: float = 0.0
    jitter_ms: float = 0.0
    quota: int | None = None
    window_s: float = 1.0
    retry_after_s: float | None = None
    seed: int = 0
    fault_rate: float = 0.0
    fault_seed: int = 0
    fault_late_s: float = 60.0
    outage_at_s: float = 0.0
    outage_s: float = 0.0

    def __post_init__(self) -> None:
        if min(self.latency_ms, self.jitter_ms, self.fault_late_s, self.outage_at_s, self.outage_s) < 0:
            raise SearchServerError("latency, jitter, outage and the delay of late answers must not be negative")
        if not 0.0 <= self.fault_rate < 1.0:
            raise SearchServerError(f"the fault rate must be at least 0 and below 1, got {self.fault_rate:g}")
        if self.quota is not None and (self.quota < 1 or self.window_s <= 0):
            raise SearchServerError("a quota needs at least 1 request and a window longer than 0 seconds")

    @property
    def fault_plan(self) -> FaultPlan:
        outage = Outage(self.outage_at_s, self.outage_s) if self.outage_s else None
        return FaultPlan(self.fault_rate, self.fault_seed, self.fault_late_s, outage, self.retry_after_s)

    def description(self, entries: str) -> str:
        """For people: what is served (`5,183 documents`) and under which conditions."""
        parts = [entries]
        if self.latency_ms or self.jitter_ms:
            parts.append(f"latency {self.latency_ms:g} ms + up to {self.jitter_ms:g} ms")
        if self.quota is not None:
            parts.append(f"quota {self.quota} per {self.window_s:g} s")
        if self.fault_rate:
            parts.append(f"{self.fault_rate:.0%} of the requests fail")
        if self.outage_s:
            parts.append(f"all of them for {self.outage_s:g} s after {self.outage_at_s:g} s")
        return ", ".join(parts)


class Traffic:
    """Counts requests, keeps each client's quota and takes the time an answer takes."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._logs: dict[str, SlidingLog] = {}
        self._random = random.Random(settings.seed)
        self._started = time.monotonic()
        self.requests = 0
        self.refused = 0

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    def admit(self, client: str) -> Verdict | None:
        """Whether a client's quota has room for one more request; None where there is no quota."""
        if self._settings.quota is None:
            return None
        if client not in self._logs:
            if len(self._logs) >= CLIENTS_KEPT:
                self._logs.pop(next(iter(self._logs)))
            self._logs[client] = SlidingLog(self._settings.quota, self._settings.window_s)
        verdict = self._logs[client].admit(time.monotonic())
        self.refused += not verdict.admitted
        return verdict

    @property
    def refusal_headers(self) -> dict[str, str]:
        """Headers of a 429 that say when to come back, if the service says so."""
        wait = self._settings.retry_after_s
        return {} if wait is None else {"Retry-After": f"{wait:g}"}

    async def wait(self) -> None:
        """The latency of one answer."""
        delay_ms = self._settings.latency_ms + self._random.uniform(0.0, self._settings.jitter_ms)
        if delay_ms > 0:
            await asyncio.sleep(delay_ms / 1000)

    def health(self, documents: int, faults: Counter[str]) -> dict[str, object]:
        """The answer of `/health`."""
        state: dict[str, object] = {
            "status": "ok",
            "documents": documents,
            "requests": self.requests,
            "refused": self.refused,
        }
        if self._settings.fault_rate or self._settings.outage_s:
            state["faults"] = dict(faults)
        return state
