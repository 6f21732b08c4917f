"""The one place where a search is tried again.

Full jitter (Brooker, "Exponential Backoff And Jitter", 2015) and a retry budget (Google SRE book,
"Handling Overload"): while most requests fail, retries are a bounded share of all requests instead of a
multiple, and every try takes its own quota slot like any request.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec

from rewarders.engines.base import EngineMisconfigured, EngineUnavailable

T = TypeVar("T")


class RetryPolicy(msgspec.Struct, frozen=True):
    """attempts: tries in all, the first included. base_s, cap_s: the n-th wait is uniform in [0,
    min(cap_s, base_s · 2^n)] seconds. max_wait_s: a longer Retry-After is not waited for, the search
    counts as unavailable at once. budget_ratio: retries allowed per first try in the long run;
    budget_burst: retries allowed at once after quiet times.
    """

    attempts: int = 3
    base_s: float = 0.5
    cap_s: float = 20.0
    max_wait_s: float = 30.0
    budget_ratio: float = 0.1
    budget_burst: float = 20.0

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError(f"attempts must be at least 1, got {self.attempts}")
        if min(self.base_s, self.cap_s, self.max_wait_s, self.budget_ratio, self.budget_burst) < 0:
            raise ValueError("waits and budget of a retry policy must not be negative")


class RetryBudget:
    """Tokens for retries: each first try earns `ratio`, each retry costs 1, at most `burst` are saved up."""

    def __init__(self, ratio: float, burst: float) -> None:
        self._ratio = ratio
        self._burst = burst
        self.tokens = burst

    def earn(self) -> None:
        """Count a first try."""
        self.tokens = min(self._burst, self.tokens + self._ratio)

    def spend(self) -> bool:
        """Take the token of one retry; False if there is none."""
        if self.tokens < 1.0:
            return False
        self.tokens -= 1.0
        return True


class Retrier:
    """Runs searches under a policy; one per rewarder, because the budget is shared."""

    def __init__(
        self,
        policy: RetryPolicy | None = None,
        *,
        rng: random.Random | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.policy = policy or RetryPolicy()
        self.budget = RetryBudget(self.policy.budget_ratio, self.policy.budget_burst)
        self.retries = 0
        self._rng = rng or random.Random()
        self._sleep = sleep

    async def run(self, operation: Callable[[], Awaitable[T]]) -> T:
        """Await `operation()` until it does not raise EngineUnavailable, at most `attempts` times.

        Raises the last EngineUnavailable; whatever else the operation raises (BadQuery above all) passes
        at once.
        """
        self.budget.earn()
        for attempt in range(self.policy.attempts):
            try:
                return await operation()
            except EngineUnavailable as error:
                if attempt + 1 >= self.policy.attempts or not self._may_retry(error):
                    raise
                wait = self._wait(attempt, error.retry_after_s)
            self.retries += 1
            await self._sleep(wait)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _may_retry(self, error: EngineUnavailable) -> bool:
        if isinstance(error, EngineMisconfigured):
            return False
        if error.retry_after_s is not None and error.retry_after_s > self.policy.max_wait_s:
            return False
        return self.budget.spend()

    def _wait(self, attempt: int, retry_after_s: float | None) -> float:
        # Capped exponent: 2.0**1024 would overflow for absurd numbers of attempts.
        backoff = self._rng.uniform(0.0, min(self.policy.cap_s, self.policy.base_s * 2.0 ** min(attempt, 60)))
        if retry_after_s is None:
            return backoff
        return retry_after_s + backoff  # jitter on top, so that a fleet told "2 s" does not come back as one
