"""The quota slots: never more than N arrivals in any window, whatever latency, kills and silence do."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from common.quota import SlotPool

HARD_DEADLINE_S = 2.0


def most_in_any_window(arrivals: list[float], window_s: float) -> int:
    arrivals = sorted(arrivals)
    return max((sum(1 for b in arrivals[i:] if b < a + window_s) for i, a in enumerate(arrivals)), default=0)


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
