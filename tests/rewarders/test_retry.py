from __future__ import annotations

import random

import pytest

from rewarders.engines.base import BadQuery, EngineMisconfigured, EngineUnavailable
from rewarders.retry import Retrier, RetryPolicy


class Trial:
    """An operation that raises the given errors in turn, then succeeds; and a clock that only notes the
    waits.
    """

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls = 0
        self.waits: list[float] = []

    async def operation(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"

    async def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)


def retrier(trial: Trial, **policy: float) -> Retrier:
    return Retrier(RetryPolicy(**policy), rng=random.Random(0), sleep=trial.sleep)  # type: ignore[arg-type]


def down(retry_after_s: float | None = None) -> EngineUnavailable:
    return EngineUnavailable("down", retry_after_s)


async def test_success_after_failures() -> None:
    trial = Trial(down(), down())
    assert await retrier(trial).run(trial.operation) == "done"
    assert trial.calls == 3


async def test_attempts_are_bounded_and_the_last_error_is_raised() -> None:
    last = down()
    trial = Trial(down(), down(), last, down())
    with pytest.raises(EngineUnavailable) as caught:
        await retrier(trial, attempts=3).run(trial.operation)
    assert caught.value is last
    assert (trial.calls, len(trial.waits)) == (3, 2)


@pytest.mark.parametrize("error", [BadQuery("((("), EngineMisconfigured("key"), KeyError("bug"), down(31.0)])
async def test_what_a_retry_cannot_mend_is_raised_at_once(error: Exception) -> None:
    trial = Trial(error)
    with pytest.raises(type(error)):
        await retrier(trial, max_wait_s=30.0).run(trial.operation)
    assert (trial.calls, trial.waits) == (1, [])


async def test_waits_have_full_jitter_under_a_growing_cap() -> None:
    waits: list[list[float]] = []
    for seed in range(200):
        trial = Trial(*(down() for _ in range(5)))
        runner = Retrier(RetryPolicy(attempts=6, base_s=1.0, cap_s=4.0), rng=random.Random(seed), sleep=trial.sleep)
        await runner.run(trial.operation)
        waits.append(trial.waits)
    for column, bound in zip(zip(*waits, strict=True), [1.0, 2.0, 4.0, 4.0, 4.0], strict=True):
        assert max(column) <= bound
        assert max(column) > 0.9 * bound
        assert min(column) < 0.1 * bound


async def test_retry_after_is_the_least_wait() -> None:
    trial = Trial(down(5.0))
    await retrier(trial, base_s=1.0).run(trial.operation)
    assert 5.0 <= trial.waits[0] <= 6.0


async def test_budget_bounds_retries_while_everything_fails() -> None:
    trial = Trial(*(down() for _ in range(10_000)))
    runner = retrier(trial, attempts=3, budget_ratio=0.1, budget_burst=5.0)
    for _ in range(1000):
        with pytest.raises(EngineUnavailable):
            await runner.run(trial.operation)
    assert runner.retries == len(trial.waits)
    assert 100 <= runner.retries <= 106
    assert trial.calls == 1000 + runner.retries


async def test_budget_comes_back_with_success() -> None:
    trial = Trial()
    runner = retrier(trial, budget_ratio=0.5, budget_burst=1.0)
    trial.errors = [down(), down()]
    with pytest.raises(EngineUnavailable):
        await runner.run(trial.operation)
    for _ in range(2):
        await runner.run(trial.operation)
    trial.errors = [down()]
    assert await runner.run(trial.operation) == "done"


@pytest.mark.parametrize("policy", [{"attempts": 0}, {"base_s": -1.0}, {"budget_ratio": -0.1}])
def test_senseless_policies_are_refused(policy: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"attempts|negative"):
        RetryPolicy(**policy)  # type: ignore[arg-type]
