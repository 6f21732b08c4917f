"""The circuit breaker, and an engine behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rewarders.breaker import Breaker
from rewarders.engines.base import (
    BadQuery,
    EngineMisconfigured,
    EngineThrottled,
    EngineUnavailable,
    SearchEngine,
    SearchRequest,
    SearchResult,
)
from rewarders.engines.guarded import GuardedEngine, guarded
from rewarders.engines.permits import Permit, Slot
from rewarders.retry import Retrier, RetryPolicy

FAILURES, PAUSE_S = 3, 5.0
REQUEST = SearchRequest("aspirin", retmax=1)
ANSWER = SearchResult(("1",), 1)


class BreakerMachine(RuleBasedStateMachine):
    """Requests begin and end in any order, at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.breaker = Breaker(FAILURES, PAUSE_S)
        self.now = 0.0
        self.opened_at = float("-inf")
        self.out: list[tuple[int, str]] = []  # number, and the state it began in

    @rule(seconds=st.floats(0.01, 10.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def begin(self) -> None:
        number = self.breaker.begin(self.now)
        if number is None:
            assert self.breaker.state != "closed"
            assert self.breaker.retry_after_s(self.now) > 0
            return
        assert self.now >= self.opened_at + PAUSE_S
        self.out.append((number, self.breaker.state))

    @precondition(lambda self: self.out)
    @rule(place=st.integers(0, 100), how=st.sampled_from(["succeeded", "failed", "abandoned"]))
    def end(self, place: int, how: str) -> None:
        number, began_in = self.out.pop(place % len(self.out))
        before, opened, stands = self.breaker.state, self.breaker.opened, self.breaker.stands(number)
        if how == "failed":
            self.breaker.failed(number, self.now)
        else:
            getattr(self.breaker, how)(number)
        if self.breaker.opened > opened:
            self.opened_at = self.now
        if not stands:
            assert self.breaker.state == before, "a late result changes nothing"
        elif began_in == "half-open":
            assert self.breaker.state == {"succeeded": "closed", "failed": "open", "abandoned": "half-open"}[how]

    @invariant()
    def one_probe_at_most(self) -> None:
        probes = [number for number, state in self.out if state == "half-open" and self.breaker.stands(number)]
        assert len(probes) <= 1


TestBreaker = BreakerMachine.TestCase


class Scripted(SearchEngine):
    """Answers, or raises what it is told to."""

    def __init__(self, permit: Permit | None = None) -> None:
        self.error: Exception | None = None
        self.asked = 0
        self.permit = permit

    async def check(self) -> None: ...

    async def search(self, request: SearchRequest) -> SearchResult:
        if self.permit is not None:
            async with self.permit():
                return self._answer()
        return self._answer()

    def _answer(self) -> SearchResult:
        self.asked += 1
        if self.error is not None:
            raise self.error
        return ANSWER


class Guarded:
    def __init__(self) -> None:
        self.now = 0.0
        self.upstream = Scripted()
        self.engine = GuardedEngine(self.upstream, Breaker(FAILURES, PAUSE_S), clock=lambda: self.now)

    async def search(self, error: Exception | None = None) -> str:
        self.upstream.error = error
        try:
            await self.engine.search(REQUEST)
        except (BadQuery, EngineUnavailable) as raised:
            return raised.reason
        return "answer"


async def test_an_open_breaker_turns_searches_away_at_once_and_names_the_cause() -> None:
    one = Guarded()
    for _ in range(FAILURES):
        await one.search(EngineUnavailable("HTTP 502"))
    with pytest.raises(EngineUnavailable, match="the last: HTTP 502") as raised:
        await one.engine.search(REQUEST)
    assert raised.value.retry_after_s == PAUSE_S
    assert one.upstream.asked == FAILURES
    assert one.engine.counters() == {"breaker_state": 2.0, "breaker_opened": 1.0, "breaker_turned_away": 1.0}
    one.now = PAUSE_S
    assert await one.search() == "answer"
    assert one.engine.counters()["breaker_state"] == 0.0


async def test_only_outages_count() -> None:
    one = Guarded()
    for error in (BadQuery("no closing quote"), EngineThrottled("rate limit exceeded", 2.0)):
        for _ in range(3 * FAILURES):
            assert await one.search(error) == error.args[0]
    outage: Callable[[], Exception] = lambda: EngineUnavailable("no answer")  # noqa: E731
    for error in (outage(), outage(), BadQuery("an answer"), outage(), outage()):
        await one.search(error)
    assert one.engine.breaker.state == "closed", "not in a row"
    await one.search(EngineMisconfigured("the API key is refused"))
    assert one.engine.breaker.state == "open"
    assert "the API key is refused" in await one.search()


async def test_a_pause_the_service_asked_for_is_kept() -> None:
    one = Guarded()
    for _ in range(FAILURES):
        await one.search(EngineUnavailable("HTTP 503", 30.0))
    one.now = 29.0
    assert "left alone" in await one.search()
    one.now = 30.0
    assert await one.search() == "answer"


async def test_one_probe_while_half_open() -> None:
    one = Guarded()
    for _ in range(FAILURES):
        await one.search(EngineUnavailable("HTTP 502"))
    one.now = PAUSE_S
    waiting = asyncio.Event()
    answering = one.upstream.search

    async def slow(request: SearchRequest) -> SearchResult:
        await waiting.wait()
        return await answering(request)

    one.upstream.search = slow  # type: ignore[method-assign]
    probe = asyncio.create_task(one.search())
    await asyncio.sleep(0)
    assert "left alone" in await one.search()
    waiting.set()
    assert await probe == "answer"
    assert one.engine.breaker.state == "closed"


async def test_searches_that_wait_for_the_quota_when_it_opens_give_their_slots_back() -> None:
    unused = 0

    class Granted:
        number = 0

        def sent(self) -> None: ...

        def replied(self, limit: int | None = None, remaining: int | None = None) -> None: ...

        def throttled(self, retry_after_s: float, refused: bool = True) -> None: ...

        def unused(self) -> None:
            nonlocal unused
            unused += 1

    turns = asyncio.Semaphore(1)

    @asynccontextmanager
    async def permit() -> AsyncIterator[Slot]:
        async with turns:
            await asyncio.sleep(0)
            yield Granted()

    breaker = Breaker(FAILURES, PAUSE_S)
    upstream = Scripted(guarded(permit, breaker))
    upstream.error = EngineUnavailable("HTTP 502")
    engine = GuardedEngine(upstream, breaker)
    results = await asyncio.gather(*(engine.search(REQUEST) for _ in range(10)), return_exceptions=True)
    assert all(isinstance(result, EngineUnavailable) for result in results)
    assert (upstream.asked, unused) == (FAILURES, 10 - FAILURES)


async def test_retries_wait_for_the_breaker() -> None:
    one = Guarded()

    async def sleep(seconds: float) -> None:
        one.now += seconds
        one.upstream.error = None

    retrier = Retrier(RetryPolicy(attempts=3), sleep=sleep)
    for _ in range(FAILURES):
        await one.search(EngineUnavailable("HTTP 502"))
    assert await retrier.run(lambda: one.engine.search(REQUEST)) == ANSWER
    assert one.now >= PAUSE_S
