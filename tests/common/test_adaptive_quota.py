"""Adaptive slots in virtual time: nearer to N / W, few refusals, strict where the service's headers do not agree."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.adaptive_quota import CALM_REPLIES, MARGIN, REFUSED_SHARE, AdaptivePool
from common.quota import Reply
from tests.common.quota_world import COUNTERS, Network, World, most_in_any_window

HARD_DEADLINE_S = 4.5
WARM_UP_S = 15.0


def pool(slots: int = 10, window_s: float = 1.0) -> AdaptivePool:
    return AdaptivePool(slots, window_s, HARD_DEADLINE_S, now=0.0, quarantine=False)


def world(counter: str, **options: object) -> World:
    return World(pool(), COUNTERS[counter](10, 1.0), 10, **options)  # type: ignore[arg-type]


def rate_after_warm_up(world: World, seconds: float) -> float:
    before = world.run(WARM_UP_S).pool.granted
    return (world.run(seconds).pool.granted - before) / seconds


@pytest.mark.parametrize("counter", COUNTERS)
@pytest.mark.parametrize("seed", range(3))
def test_nearly_all_of_the_quota_is_granted_under_every_counter(counter: str, seed: int) -> None:
    one = world(counter, network=Network(stalls=0.01, lost=0.001), seed=seed)
    assert rate_after_warm_up(one, 300.0) >= 9.5
    assert one.refused <= 0.001 * one.pool.granted


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(sorted(COUNTERS)), st.floats(0.0, 0.2), st.integers(0, 10_000))
def test_refusals_keep_to_their_budget_whatever_the_network_does(counter: str, jitter_s: float, seed: int) -> None:
    network = Network(there=lambda rng: 0.02 + rng.expovariate(1 / (jitter_s + 1e-6)), stalls=0.01, lost=0.005)
    one = world(counter, network=network, seed=seed).run(200.0)
    # One window's requests may be under way when a refusal is heard of.
    assert one.refused <= (2 + REFUSED_SHARE * one.pool.granted) * 3


@settings(max_examples=20, deadline=None)
@given(st.floats(0.0, 0.5), st.integers(0, 10_000))
def test_without_headers_it_is_strict(jitter_s: float, seed: int) -> None:
    network = Network(there=lambda rng: rng.expovariate(1 / (jitter_s + 1e-6)), headers=False)
    one = world("sliding", network=network, seed=seed).run(30.0)
    assert not one.pool.trusted(one.now)  # type: ignore[attr-defined]
    assert most_in_any_window(one.arrivals, 1.0) <= 10
    assert one.refused == 0


def test_somebody_else_with_the_same_key_keeps_it_strict() -> None:
    one = world("sliding", foreign_per_s=2.0, seed=5).run(120.0)
    assert one.pool.surprises > 0  # type: ignore[attr-defined]
    assert not one.pool.trusted(one.now)  # type: ignore[attr-defined]
    assert one.pool.granted / 120.0 < 8.0, "each refusal is a pause for all"


def calm(one: AdaptivePool, replies: int, now: float = 0.0, took_s: float = 0.2) -> float:
    """Requests that the service answers one after the other, with headers that agree."""
    for number in range(replies):
        one.request("w", number, now)
        (grant,) = one.grant(now)
        one.replied(grant.slot, grant.grant, now + took_s, Reply(10, 9, 0.0, took_s))
        now += 1.0
    return now


def frees_at(one: AdaptivePool, time: float) -> bool:
    """Whether the next waiting request gets its slot at that time, and no sooner."""
    return one.grant(time - 1e-3) == [] and len(one.grant(time + 1e-3)) == 1


def test_trust_takes_calm_replies_and_then_frees_a_slot_a_window_after_its_request() -> None:
    one = pool(slots=1)
    one.request("w", 0, 0.0)
    (grant,) = one.grant(0.0)
    now = 0.0
    for number in range(1, 3 * CALM_REPLIES):
        one.request("w", number, now)
        one.replied(grant.slot, grant.grant, now + 0.2, Reply(1, 0, 0.0, 0.2))
        free_at = now + (1.2 if number < CALM_REPLIES else 1.0 + MARGIN)
        assert one.grant(free_at - 1e-3) == [], number
        now = free_at + 1e-9
        (grant,) = one.grant(now)


def test_an_answer_that_took_longer_than_usual_may_have_been_late_on_its_way() -> None:
    one = pool(slots=10)
    now = calm(one, 60) + 1.0
    assert one.trusted(now)
    for number in range(10):
        one.request("w", number, now)
    grants = one.grant(now)
    one.request("w", 99, now)
    one.replied(grants[0].slot, grants[0].grant, now + 0.7, Reply(10, 9, 0.0, 0.7))
    assert frees_at(one, now + 0.5 + 1.02), "0.5 s later than the fastest"


def test_a_count_higher_than_ours_and_a_refusal_end_trust() -> None:
    one = pool()
    now = calm(one, 40)
    one.request("w", 1, now)
    (grant,) = one.grant(now)
    one.replied(grant.slot, grant.grant, now + 0.2, Reply(10, 4, 0.0, 0.2))
    assert one.surprises == 1
    assert not one.trusted(now)
    now = calm(one, 40, now + 2.0)
    assert one.trusted(now)
    one.throttled(2.0, now)
    assert not one.trusted(now + 5.0)
    one.request("w", 1, now)
    assert one.grant(now + 1.9) == []
    assert len(one.grant(now + 2.0)) == 1


def test_a_second_refusal_has_to_be_earned() -> None:
    one = pool()
    now = calm(one, 40)
    for _ in range(2):
        one.throttled(0.0, now)
    now = calm(one, 100, now)
    assert not one.trusted(now)
    now = calm(one, math.ceil(1 / REFUSED_SHARE), now)
    assert one.trusted(now)


def test_the_services_own_lower_limit_counts() -> None:
    one = pool(slots=4)
    for number in range(4):
        one.request("w", number, 0.0)
    first = one.grant(0.0)
    for grant in first:
        one.replied(grant.slot, grant.grant, 0.1, Reply(2, 0, 0.0, 0.1))
    for number in range(8):
        one.request("w", 10 + number, 0.1)
    second = one.grant(5.0)
    assert len(second) == 2
    for grant in second:
        one.replied(grant.slot, grant.grant, 5.1, Reply(9, 0, 0.0, 0.1))
    assert len(one.grant(10.0)) == 4, "never more than configured"
