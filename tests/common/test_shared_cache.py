"""Shared results: Hypothesis plays rewarders that fetch, fail, fall silent, die and put what nobody asked for."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from common.shared_cache import ENTRY_BYTES, Promoted, SharedCache, Told

PEERS = ["a", "b", "c", "d"]
KEYS = [b"k%d" % number for number in range(5)]
PROMISE_S = 10.0
MAX_BYTES, MAX_ENTRIES = 3 * ENTRY_BYTES + 60, 4
MAX_ASKING, MAX_ASKING_EACH = 9, 3
WHO = st.sampled_from(PEERS)
WHAT = st.sampled_from(KEYS)


class SharingMachine(RuleBasedStateMachine):
    """What every peer was told last, in plain dicts beside the cache."""

    @initialize()
    def start(self) -> None:
        self.cache = SharedCache(PROMISE_S, MAX_BYTES, MAX_ENTRIES, MAX_ASKING, MAX_ASKING_EACH)
        self.now = 0.0
        self.fetcher: dict[bytes, str] = {}
        self.deadline: dict[bytes, float] = {}
        self.waiting: dict[bytes, list[str]] = {}  # in order of asking
        self.newest: dict[bytes, bytes] = {}

    def asking_of(self, peer: str) -> int:
        return sum(peer == self.fetcher[key] or peer in self.waiting[key] for key in self.fetcher)

    def ends(self, key: bytes) -> list[str]:
        """The flight is over; returns who waited."""
        self.fetcher.pop(key, None)
        self.deadline.pop(key, None)
        return self.waiting.pop(key, [])

    def expected_after_fetcher(self, key: bytes) -> list[Promoted]:
        if not self.waiting[key]:
            self.ends(key)
            return []
        self.fetcher[key] = self.waiting[key].pop(0)
        self.deadline[key] = self.now + PROMISE_S
        return [Promoted(self.fetcher[key], key)]

    @rule(key=WHAT, peer=WHO)
    def get(self, key: bytes, peer: str) -> None:
        asking = sum(self.asking_of(other) for other in PEERS)
        full = asking >= MAX_ASKING or self.asking_of(peer) >= MAX_ASKING_EACH
        answer = self.cache.get(key, peer, self.now)
        if isinstance(answer, bytes):
            assert key not in self.fetcher, "kept and in flight at once"
            assert answer == self.newest[key]
        elif self.fetcher.get(key) == peer:
            assert answer is Told.FETCH
            self.deadline[key] = self.now + PROMISE_S
        elif peer in self.waiting.get(key, ()):
            assert answer is Told.WAIT
        elif full:
            assert answer is Told.ALONE
        elif key in self.fetcher:
            assert answer is Told.WAIT, "one fetcher is enough"
            self.waiting[key].append(peer)
        else:
            assert answer is Told.FETCH
            self.fetcher[key], self.deadline[key], self.waiting[key] = peer, self.now + PROMISE_S, []

    @rule(key=WHAT, peer=WHO, size=st.integers(1, 400))
    def put_asked_or_not(self, key: bytes, peer: str, size: int) -> None:
        payload = bytes(size)
        served = self.cache.put(key, payload, peer)
        assert served == [waiter for waiter in self.ends(key) if waiter != peer], "everybody who waited, once"
        self.newest[key] = payload

    @rule(key=WHAT, peer=WHO)
    def fail_asked_or_not(self, key: bytes, peer: str) -> None:
        promoted = self.cache.failed(key, peer, self.now)
        if self.fetcher.get(key) == peer:
            assert promoted == self.expected_after_fetcher(key)
            return
        assert promoted == []
        if peer in self.waiting.get(key, ()):
            self.waiting[key].remove(peer)

    @rule(key=WHAT, peer=WHO)
    def renew(self, key: bytes, peer: str) -> None:
        self.cache.renew(key, peer, self.now)
        if self.fetcher.get(key) == peer:
            self.deadline[key] = self.now + PROMISE_S

    @rule(peer=WHO)
    def leave(self, peer: str) -> None:
        expected = []
        for key in sorted(self.fetcher):
            if peer in self.waiting[key]:
                self.waiting[key].remove(peer)
            elif self.fetcher[key] == peer:
                expected += self.expected_after_fetcher(key)
        assert self.cache.leave(peer, self.now) == expected
        assert self.asking_of(peer) == 0

    @rule(seconds=st.sampled_from([0.0, 1.0, 4.0, 11.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        due = sorted((at, key) for key, at in self.deadline.items() if at <= self.now)
        event = self.cache.next_event()
        assert event == min(self.deadline.values(), default=None)
        expected = [promoted for _, key in due for promoted in self.expected_after_fetcher(key)]
        assert sorted(self.cache.expire(self.now)) == sorted(expected)

    @invariant()
    def bounded_and_one_fetcher_each(self) -> None:
        assert self.cache.bytes <= MAX_BYTES
        assert len(self.cache) <= MAX_ENTRIES
        assert self.cache.in_flight == len(self.fetcher)
        assert self.cache.asking == sum(self.asking_of(peer) for peer in PEERS) <= MAX_ASKING

    def teardown(self) -> None:
        """Where all fall silent, nobody waits longer than a promise for each who was before."""
        if not hasattr(self, "cache"):
            return
        for _ in range(len(PEERS)):
            self.now += PROMISE_S
            self.cache.expire(self.now)
        assert (self.cache.in_flight, self.cache.asking, self.cache.next_event()) == (0, 0, None)


SharingMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestSharing = SharingMachine.TestCase


def test_the_least_recently_used_result_goes_first() -> None:
    cache = SharedCache(PROMISE_S, 3 * (ENTRY_BYTES + 12))
    for key in KEYS[:3]:
        cache.put(key, bytes(10), "a")
    assert cache.get(KEYS[0], "a", 0.0) == bytes(10)
    cache.put(KEYS[3], bytes(10), "a")
    kept = [key for key in KEYS if isinstance(cache.get(key, "b", 0.0), bytes)]
    assert kept == [KEYS[0], KEYS[2], KEYS[3]]


def test_without_bytes_nothing_is_kept_but_flights_are_shared() -> None:
    cache = SharedCache(PROMISE_S, 0)
    assert cache.get(KEYS[0], "a", 0.0) is Told.FETCH
    assert cache.get(KEYS[0], "b", 0.0) is Told.WAIT
    assert cache.put(KEYS[0], b"found", "a") == ["b"]
    assert (len(cache), cache.bytes) == (0, 0)
    assert cache.get(KEYS[0], "b", 0.0) is Told.FETCH
