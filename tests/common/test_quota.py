"""The quota slots: never more than N arrivals in any window, whatever latency, kills and silence do."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from common.messages import MAX_RETRY_AFTER_S
from common.quota import USE_GRANT_WITHIN_S, Reply, SlotPool
from tests.common.quota_world import COUNTERS, Network, World, most_in_any_window

HARD_DEADLINE_S = 2.0


@given(st.integers(1, 6), st.floats(0.1, 2.0), st.integers(0, 10_000))
def test_arrivals_never_exceed_the_quota_in_any_window(slots: int, window_s: float, seed: int) -> None:
    rng = random.Random(seed)
    pool = SlotPool(slots, window_s, HARD_DEADLINE_S, now=0.0, quarantine=False)
    now, arrivals, replies = 0.0, [], []
    for number in range(60):
        pool.request(f"w{number % 3}", number, now)
        for grant in pool.grant(now):
            reply_at = now + rng.uniform(0.001, HARD_DEADLINE_S)
            arrivals.append(rng.uniform(now, reply_at))
            if rng.random() < 0.8:  # the others were killed before they could report
                replies.append((reply_at, grant.slot, grant.grant))
        now += rng.expovariate(4.0)
        for reply in sorted(replies):
            if reply[0] <= now:
                replies.remove(reply)
                pool.replied(reply[1], reply[2], now)
    assert len(arrivals) > 0
    assert most_in_any_window(arrivals, window_s) <= slots


def test_a_slot_is_free_one_window_after_the_answer_and_no_sooner() -> None:
    pool = SlotPool(1, window_s=1.0, hard_deadline_s=HARD_DEADLINE_S, now=0.0, quarantine=False)
    pool.request("w", 1, 0.0)
    (first,) = pool.grant(0.0)
    pool.request("w", 2, 0.0)
    assert pool.replied(first.slot, first.grant, 0.3)
    assert pool.next_event() == 1.3
    assert pool.grant(1.29) == []
    (second,) = pool.grant(1.3)
    assert (second.worker, second.request) == ("w", 2)
    assert not pool.replied(first.slot, first.grant, 1.4), "an answer counts once"


def test_a_silent_grant_frees_itself_after_the_deadline_and_the_window() -> None:
    pool = SlotPool(1, window_s=1.0, hard_deadline_s=HARD_DEADLINE_S, now=0.0, quarantine=False)
    pool.request("w", 1, 0.0)
    pool.grant(0.0)
    pool.request("v", 2, 0.0)
    assert pool.grant(2.99) == []
    assert [g.worker for g in pool.grant(3.0)] == ["v"]


def test_outdated_heap_entries_do_not_free_a_slot_twice() -> None:
    pool = SlotPool(1, window_s=1.0, hard_deadline_s=HARD_DEADLINE_S, now=0.0, quarantine=False)
    granted = 0
    now = 0.0
    for number in range(10):
        pool.request("w", number, now)
        pool.request("w", 100 + number, now)
        for grant in pool.grant(now):
            granted += 1
            pool.replied(grant.slot, grant.grant, now)
        now += 1.0
    assert granted == 10
    assert pool.grant(now - 0.5) == []


def test_a_new_broker_stays_closed_until_old_requests_are_over() -> None:
    pool = SlotPool(2, window_s=1.0, hard_deadline_s=HARD_DEADLINE_S, now=10.0)
    pool.request("w", 1, 0.0)
    assert pool.grant(12.9) == []
    assert len(pool.grant(13.0)) == 1


def test_a_leaving_worker_does_not_take_slots() -> None:
    pool = SlotPool(1, window_s=1.0, hard_deadline_s=HARD_DEADLINE_S, now=0.0, quarantine=False)
    pool.request("gone", 1, 0.0)
    pool.request("here", 2, 0.0)
    pool.leave("gone")
    assert [g.worker for g in pool.grant(0.0)] == ["here"]


def open_pool(slots: int = 1) -> SlotPool:
    return SlotPool(slots, window_s=1.0, hard_deadline_s=HARD_DEADLINE_S, now=0.0, quarantine=False)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(COUNTERS)), st.floats(0.0, 0.5), st.integers(1, 12), st.integers(0, 10_000))
def test_strict_is_never_refused_whatever_the_network_and_the_counter_do(
    counter: str, jitter_s: float, slots: int, seed: int
) -> None:
    """Jitter far beyond what adaptive would bear, on the way there; answers lost; nothing above the deadline."""
    network = Network(
        there=lambda rng: min(1.0, rng.expovariate(1 / (jitter_s + 1e-6))),
        work=lambda rng: rng.uniform(0.0, 0.5),
        back=lambda rng: rng.uniform(0.0, 0.4),
        lost=0.02,
    )
    world = World(open_pool(slots), COUNTERS[counter](slots, 1.0), slots, network, seed=seed).run(60.0)
    assert world.refused == 0
    assert most_in_any_window(world.arrivals, 1.0) <= slots


def test_a_pause_the_service_asks_for_holds_for_everybody_and_is_bounded() -> None:
    pool = open_pool(slots=3)
    for worker in ("one", "two"):
        pool.request(worker, 1, 0.0)
    pool.throttled(2.0, 0.0)
    pool.throttled(0.5, 0.1)  # a shorter one does not end it
    assert pool.next_event() == 2.0
    assert pool.grant(1.99) == []
    assert len(pool.grant(2.0)) == 2
    assert pool.refused == 2
    pool.throttled(1e6, 2.0, refused=False)
    pool.request("one", 2, 2.0)
    assert pool.refused == 2
    assert pool.grant(2.0 + MAX_RETRY_AFTER_S - 0.1) == []
    assert len(pool.grant(2.0 + MAX_RETRY_AFTER_S)) == 1


def test_an_unused_slot_is_free_at_once() -> None:
    pool = open_pool()
    pool.request("one", 1, 0.0)
    (grant,) = pool.grant(0.0)
    pool.request("two", 1, 0.0)
    assert pool.replied(grant.slot, grant.grant, 0.6, Reply(unused=True))
    assert [granted.worker for granted in pool.grant(0.6)] == ["two"]


def test_a_grant_says_how_long_its_request_waited() -> None:
    pool = open_pool()
    for number, asked in enumerate((0.0, 1.0)):
        pool.request("w", number, asked)
    assert [granted.waited_s for granted in pool.grant(1.5)] == [1.5]
    assert [granted.waited_s for granted in pool.grant(4.5)] == [3.5]


def test_a_stopped_worker_sinks_one_slot() -> None:
    pool = open_pool(slots=4)
    for number in range(4):
        pool.request("stopped", number, 0.0)
        pool.request("alive", number, 0.0)
    first = pool.grant(0.0)
    assert [granted.worker for granted in first] == ["stopped", "alive", "stopped", "alive"]
    for granted in first[1::2]:
        pool.heard("alive")
        pool.replied(granted.slot, granted.grant, 0.1)
    assert [granted.worker for granted in pool.grant(1.2)] == ["alive", "alive"], "it is silent by now"
    assert USE_GRANT_WITHIN_S < 1.2
    later = pool.grant(3.0)
    assert [granted.worker for granted in later] == ["stopped", "stopped"], "nobody else waits"
    pool.heard("stopped")


def test_grants_of_two_brokers_do_not_meet() -> None:
    pool = SlotPool(1, 1.0, HARD_DEADLINE_S, now=0.0, quarantine=False, first_grant=5_000)
    pool.request("w", 1, 0.0)
    (grant,) = pool.grant(0.0)
    assert grant.grant == 5_000
    assert not pool.replied(grant.slot, 1, 0.1), "an answer to another broker's first grant"
    assert pool.granted == 1
