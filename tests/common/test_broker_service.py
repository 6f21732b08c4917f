"""The broker's decisions without sockets: whose answer counts, who leads, who is listened to, what is bounded."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from common import messages as m
from common.broker.conduct import Conduct
from common.broker.quota_desk import MAX_SLOT_REQUESTS
from common.broker.service import (
    MAX_CREDIT,
    MAX_PEERS,
    BrokerService,
    BrokerSettings,
    Outgoing,
)
from tests.common.broker_world import rollout, scores, ticket

SETTINGS = BrokerSettings(epoch=1_700_000_000_000, lease_s=10.0, heartbeat_s=1.0, bad_frames_allowed=3, ban_s=60.0)


class Broker:
    """A service and its clock; what it wants to send is kept by peer."""

    def __init__(self, settings: BrokerSettings = SETTINGS) -> None:
        self.service = BrokerService(settings, now=0.0)
        self.now = 100.0
        self.sent: dict[str, list[Outgoing]] = {}

    def say(self, peer: str, message: m.AnyToBroker, payload: m.Payload = (), role: m.Role | None = None) -> list[str]:
        """What the peer is told at once and after a tick, as names of messages."""
        role = role or self._role_of(peer)
        if self.service.banned(peer, role, self.now):
            return []
        told = self.service.handle(peer, role, message, payload, self.now) + self.service.tick(self.now)
        for out in told:
            self.sent.setdefault(out.peer, []).append(out)
        return [type(out.message).__name__ for out in told if out.peer == peer]

    def _role_of(self, peer: str) -> m.Role:
        return next(role for role in ("learner", "actor", "rewarder", "monitor") if peer.startswith(role))  # type: ignore[return-value]

    def join(self, *peers: str, credit: int = 1, incarnation: int = 1) -> None:
        stages: dict[str, m.StageName] = {"actor": "rollout", "rewarder": "score", "learner": "train"}
        for peer in peers:
            role = self._role_of(peer)
            assert self.say(peer, m.Hello(role, incarnation))[0] == "Welcome"
            if credit:
                self.say(peer, m.Serve(stages[role], credit))

    def submit(self, *numbers: int) -> list[str]:
        return self.say("learner", m.Submit(numbers), [m.encode(ticket(number)) for number in numbers])

    def lease(self, peer: str) -> m.LeaseRef:
        """The newest lease this peer was given."""
        return self.leases(peer)[-1]

    def leases(self, peer: str) -> list[m.LeaseRef]:
        return [out.message.lease for out in self.sent.get(peer, []) if isinstance(out.message, m.Assign)]

    def heartbeat(self, peer: str) -> list[str]:
        return self.say(peer, m.Heartbeat(tuple(self.leases(peer)), {}, m.PeerStatus()))

    def sizes(self) -> dict[str, tuple[int, int]]:
        return {name: (stage.queued, stage.leased) for name, stage in self.service.stages.items()}


# --------------------------------------------------------------------------- what is scored first


def with_groups_to_score(versions: dict[int, int]) -> Broker:
    """Groups by ticket, generated with these versions; those with numbers above 100 are held out."""
    broker = Broker()
    broker.join("learner", "actor", credit=len(versions))
    tickets = [m.encode(ticket(number, "eval" if number > 100 else "train")) for number in versions]
    broker.say("learner", m.Submit(tuple(versions)), tickets)
    for lease in broker.leases("actor"):
        broker.say("actor", m.Complete(lease), m.encode_rollout(rollout(lease.item, version=versions[lease.item])))
    return broker


def scored_in_order(broker: Broker) -> list[int]:
    """Tickets as a rewarder that takes one at a time is given them."""
    broker.join("rewarder")
    while broker.sizes()["score"][1]:
        lease = broker.lease("rewarder")
        broker.say("rewarder", m.Complete(lease), [m.encode(scores(lease.item))])
    return [lease.item for lease in broker.leases("rewarder")]


def test_held_out_groups_are_scored_first_and_then_those_that_expire_first() -> None:
    assert scored_in_order(with_groups_to_score({3: 6, 1: 7, 2: 6, 4: 4, 102: 9, 101: 9})) == [101, 102, 4, 2, 3, 1]


def test_a_group_that_comes_back_goes_before_those_that_were_never_given_out() -> None:
    broker = with_groups_to_score({1: 8, 2: 9})
    broker.join("rewarder-lost")
    broker.submit(3)
    broker.say("actor", m.Complete(broker.lease("actor")), m.encode_rollout(rollout(3, version=1)))
    broker.say("rewarder-lost", m.Bye())
    assert scored_in_order(broker) == [1, 3, 2]


# --------------------------------------------------------------------------- whose answer counts


def test_lease_numbers_of_two_brokers_never_meet_and_fit_the_wire() -> None:
    first, second = Broker(), Broker(BrokerSettings(epoch=SETTINGS.epoch + 1))
    for broker in (first, second):
        broker.join("learner", "actor", credit=MAX_CREDIT)
        broker.submit(*range(1000))
    numbers = [{lease.lease for lease in broker.leases("actor")} for broker in (first, second)]
    assert len(numbers[0]) == len(numbers[1]) == 1000
    assert max(numbers[0]) < min(numbers[1]), "a millisecond later, and a thousand leases do not reach the successor's"
    stray = m.Complete(first.lease("actor"))
    assert second.say("actor", stray, m.encode_rollout(rollout(first.lease("actor").item))) == []
    assert second.service.stages["rollout"].late == 1
    in_the_year_2100 = BrokerSettings(epoch=4_102_444_800_000).first_lease
    assert m.decode(m.encode(m.LeaseRef("rollout", 1, in_the_year_2100)), m.LeaseRef).lease == in_the_year_2100


def test_a_replayed_frame_of_another_peer_changes_nothing() -> None:
    broker = Broker()
    broker.join("learner", "actor-1", credit=4)
    broker.submit(1, 2)
    lease = broker.lease("actor-1")
    answer = m.encode_rollout(rollout(lease.item))
    broker.join("actor-2", credit=0)
    before = broker.sizes()
    broker.say("actor-2", m.Complete(lease), answer)
    broker.say("actor-2", m.Release(lease, 0.0, "replayed"))
    broker.say("actor-2", m.Heartbeat((lease,), {"rollout": 1 << 53}, m.PeerStatus()))
    assert broker.sizes() == before
    assert broker.service.stages["rollout"].late == 2
    broker.say("actor-1", m.Complete(lease), answer)
    broker.say("actor-1", m.Complete(lease), answer)
    assert broker.sizes()["score"] == (1, 0), "its own answer counts, once"


def test_a_result_with_another_number_of_samples_is_refused_before_it_replaces_the_lease() -> None:
    broker = Broker()
    broker.join("learner", "actor", "rewarder", credit=4)
    broker.submit(1)
    full = rollout(1)
    short = m.Rollout(
        m.RolloutHeader(1, "actor", 3, full.header.samples[:1]), full.prompt_ids, full.token_ids[:5], full.logprobs[:5]
    )
    assert broker.say("actor", m.Complete(broker.lease("actor")), m.encode_rollout(short)) == ["Protest"]
    assert broker.sizes()["rollout"] == (0, 1)
    broker.say("actor", m.Complete(broker.lease("actor")), m.encode_rollout(full))
    few = m.GroupScores(1, "rewarder", scores(1).scores[:1])
    assert broker.say("rewarder", m.Complete(broker.lease("rewarder")), [m.encode(few)]) == ["Protest"]
    assert broker.sizes()["score"] == (0, 1)
    broker.say("rewarder", m.Complete(broker.lease("rewarder")), [m.encode(scores(1))])
    (delivered,) = [out for out in broker.sent["learner"] if isinstance(out.message, m.Assign)]
    assert m.decode_scored_group(delivered.payload).scores == scores(1)


def test_a_silent_peer_is_given_nothing_more_and_an_unreachable_one_loses_its_work_at_once() -> None:
    broker = Broker()
    broker.join("learner", "actor-silent", credit=8)
    broker.submit(1)
    broker.now += SETTINGS.lease_s + 0.1
    broker.heartbeat("learner")
    assert broker.sizes()["rollout"] == (1, 0), "its lease has run out and it was given no other"
    assert broker.heartbeat("actor-silent") == ["Who"]
    broker.join("actor-gone", credit=8)
    assert broker.sizes()["rollout"] == (0, 1)
    broker.service.unreachable("actor-gone")
    broker.join("actor-here", credit=8)
    assert [lease.item for lease in broker.leases("actor-here")] == [1]


# --------------------------------------------------------------------------- who leads


def test_an_older_learner_is_told_so_and_clears_nothing() -> None:
    broker = Broker()
    broker.join("learner", incarnation=7)
    broker.submit(1, 2)
    assert broker.say("learner-old", m.Hello("learner", 6)) == ["Superseded"]
    assert broker.sent["learner-old"][-1].message == m.Superseded(7)
    assert broker.say("learner-old", m.Submit((3,)), [m.encode(ticket(3))]) == ["Who"], "it was not admitted"
    assert broker.sizes()["rollout"] == (2, 0)
    assert broker.say("learner", m.Hello("learner", 6)) == ["Superseded"], "nor under the name of the present one"
    assert broker.submit(3) == []
    assert broker.sizes()["rollout"] == (3, 0)
    assert broker.say("learner", m.Announce(m.RunState(6, 99))) == ["Superseded"]
    assert broker.service.state == m.RunState(7, 0)
    broker.join("learner-new", incarnation=8)
    assert broker.sizes()["rollout"] == (0, 0), "a newer one voids the work of the old"


# --------------------------------------------------------------------------- who is listened to


def garbage(broker: Broker, peer: str) -> list[str]:
    """A message whose first frame means nothing."""
    role: m.Role = "actor" if peer.startswith("actor") else "learner"
    if broker.service.banned(peer, role, broker.now):
        return ["dropped"]
    return [type(out.message).__name__ for out in broker.service.bad_frame(peer, role, "no message", broker.now)]


@pytest.mark.parametrize("introduced", [True, False])
def test_a_peer_that_sends_bad_frames_is_ignored_for_a_while(
    introduced: bool, caplog: pytest.LogCaptureFixture
) -> None:
    broker = Broker()
    broker.join("learner", credit=4)
    if introduced:
        broker.join("actor-bad", credit=1)
        broker.submit(1)
    told = [garbage(broker, "actor-bad") for _ in range(6)]
    assert told == [["Protest"]] * 3 + [[]] + [["dropped"]] * 2
    assert broker.say("actor-bad", m.Hello("actor")) == [], "a Hello does not help"
    assert broker.service.rejected_frames == 4
    assert "actor 'actor-bad' sent bad frames and is ignored for 60 s" in caplog.text
    if introduced:
        assert broker.sizes()["rollout"] == (1, 0), "its lease is free again"
    broker.now += 61.0
    broker.join("actor-bad")
    assert garbage(broker, "actor-bad") == [], "counted anew, but it has had its protests"
    assert not broker.service.banned("actor-bad", "actor", broker.now)


def test_rare_bad_frames_are_forgiven() -> None:
    broker = Broker()
    for _ in range(20):
        garbage(broker, "actor-clumsy")
        assert not broker.service.banned("actor-clumsy", "actor", broker.now)
        broker.now += SETTINGS.ban_s + 1


def test_a_key_of_one_role_cannot_get_a_peer_of_another_role_banned_or_act_for_it() -> None:
    broker = Broker()
    broker.join("learner", credit=4)
    for _ in range(10):
        broker.say("learner", m.Hello("actor"), role="actor")
        broker.say("learner", m.Submit((9,)), [m.encode(ticket(9))], role="actor")
    assert broker.service.banned("learner", "actor", broker.now)
    assert not broker.service.banned("learner", "learner", broker.now)
    assert broker.sizes()["rollout"] == (0, 0)
    broker.submit(1)
    assert broker.sizes()["rollout"] == (1, 0)


def test_an_unknown_peer_is_asked_who_it_is_once_per_heartbeat() -> None:
    broker = Broker()
    told = []
    for _ in range(30):
        told += broker.heartbeat("actor-unknown")
        broker.now += 0.1
    assert told == ["Who"] * 3


def test_a_message_without_payload_has_none() -> None:
    broker = Broker()
    broker.join("learner")
    assert broker.say("learner", m.StatusRequest(), [b"x"]) == ["Protest"]
    assert broker.say("learner", m.Complete(m.LeaseRef("train", 1, 1)), [b"x"]) == ["Protest"]


def test_bans_are_logged_once_a_second_at_most(caplog: pytest.LogCaptureFixture) -> None:
    broker = Broker()
    with caplog.at_level(logging.WARNING):
        for number in range(200):
            for _ in range(4):
                garbage(broker, f"actor-{number}")
            broker.now += 0.01
    assert broker.service.conduct.bans == 200
    assert len(caplog.records) == 2


# --------------------------------------------------------------------------- what is bounded


def test_the_tables_of_peers_are_bounded_and_forget_the_longest_silent() -> None:
    broker = Broker()
    broker.join("learner", credit=0)
    for number in range(3 * MAX_PEERS):
        name = f"actor-{number}"
        broker.service.handle(name, "actor", m.Hello("actor"), (), broker.now)
        broker.service.bad_frame(f"actor-stranger-{number}", "actor", "no message", broker.now)
        if number % 100 == 0:
            broker.service.handle("learner", "learner", m.Heartbeat((), {}, m.PeerStatus()), (), broker.now)
    names = {entry.name for entry in broker.service.status(broker.now).peers}
    assert len(names) == MAX_PEERS
    assert {"learner", name} <= names
    assert len(broker.service.conduct) == MAX_PEERS


def test_the_conduct_of_a_source_is_remembered_as_long_as_it_is_among_the_newest() -> None:
    conduct = Conduct(bad_frames_allowed=1, ban_s=60.0, ask_every_s=1.0, remembered=2)
    bad: tuple[m.Role, str] = ("actor", "bad")
    assert not conduct.bad_frame(bad, 0.0)
    conduct.bad_frame(("actor", "other"), 0.0)
    assert conduct.bad_frame(bad, 0.0)
    for name in ("x", "y"):
        conduct.bad_frame(("actor", name), 0.0)
    assert not conduct.banned(bad, 0.0)
    assert len(conduct) == 2


def test_credit_is_capped() -> None:
    broker = Broker()
    broker.join("learner", "actor", credit=1 << 20)
    for start in range(0, 2 * MAX_CREDIT, 1000):
        broker.submit(*range(start, start + 1000))
    assert broker.sizes()["rollout"][1] == MAX_CREDIT


def test_slot_requests_are_bounded_and_only_the_holder_can_give_a_slot_back() -> None:
    broker = Broker(BrokerSettings(epoch=1, quota=(1, 1.0, 2.0), bad_frames_allowed=100))
    broker.join("rewarder-1", "rewarder-2", credit=0)
    told = [broker.say("rewarder-1", m.SlotRequest(number)) for number in range(MAX_SLOT_REQUESTS + 2)]
    assert told == [["SlotGrant"]] + [[]] * MAX_SLOT_REQUESTS + [["Protest"]]
    (grant,) = [out.message for out in broker.sent["rewarder-1"] if isinstance(out.message, m.SlotGrant)]
    broker.say("rewarder-2", m.SlotReplied(grant.slot, grant.grant))
    broker.now += 1.5
    assert broker.heartbeat("rewarder-2") == []
    assert broker.service.status(broker.now).slots_in_use == 1
    broker.say("rewarder-1", m.SlotReplied(grant.slot, grant.grant))
    assert broker.service.status(broker.now).slots_in_use == 0


def test_a_grant_that_cannot_be_sent_frees_its_slot_at_once() -> None:
    broker = Broker(BrokerSettings(epoch=1, quota=(1, 1.0, 2.0)))
    broker.join("rewarder-gone", "rewarder-here", credit=0)
    broker.say("rewarder-gone", m.SlotRequest(1))
    (grant,) = [out.message for out in broker.sent["rewarder-gone"] if isinstance(out.message, m.SlotGrant)]
    broker.service.unreachable("rewarder-gone")
    broker.service.undelivered(grant, broker.now)
    assert broker.say("rewarder-here", m.SlotRequest(1)) == ["SlotGrant"]


def test_requests_for_the_status_are_answered_together() -> None:
    broker = Broker()
    broker.join("learner", "monitor", credit=0)
    told = []
    for _ in range(100):
        told += broker.say("monitor", m.StatusRequest())
    assert told == ["StatusReply"]
    due = broker.service.next_event()
    assert due is not None
    assert broker.now < due <= broker.now + 0.1
    assert [type(out.message) for out in broker.service.tick(due)] == [m.StatusReply]
    assert broker.service.next_event() is None


def test_a_state_is_announced_once_per_change() -> None:
    broker = Broker()
    broker.join("learner", "actor")
    for version in (1, 1, 1, 2):
        broker.say("learner", m.Announce(m.RunState(1, version)))
    states = [out.message.state.version for out in broker.sent["actor"] if isinstance(out.message, m.StateUpdate)]
    assert states == [1, 2]


def test_with_the_learner_paused_every_stage_stays_within_its_bounds_and_all_goes_on_afterwards() -> None:
    size = sum(len(memoryview(frame).cast("B")) for frame in m.encode_rollout(rollout(0, tokens=300)))
    settings = BrokerSettings(epoch=1, lease_s=1e6, queue_items=40, queue_bytes=25 * size)
    broker = Broker(settings)
    broker.join("learner", credit=0)
    broker.join("actor-1", "actor-2", "rewarder-1", credit=7)
    answered: set[m.LeaseRef] = set()
    waiting = list(range(300))
    peak_items, peak_bytes = [0], [0]

    def work() -> None:
        """Everybody but the learner answers everything; the learner floods with what is not there yet."""
        missing = [n for n in waiting if not any(n in stage for stage in broker.service.stages.values())]
        if missing:
            broker.submit(*missing)
        for peer in ("actor-1", "actor-2", "rewarder-1"):
            for lease in broker.leases(peer):
                if lease not in answered:
                    answered.add(lease)
                    result = m.encode_rollout(rollout(lease.item, tokens=300))
                    broker.say(peer, m.Complete(lease), result if "actor" in peer else [m.encode(scores(lease.item))])
        for stage in broker.service.stages.values():
            peak_items.append(len(stage))
            peak_bytes.append(stage.bytes)

    for _ in range(30):
        work()
    stuck = broker.sizes()
    work()
    assert broker.sizes() == stuck, "everything waits for the learner"
    broker.say("learner", m.Serve("train", 5))
    received: list[int] = []
    while waiting:
        for lease in broker.leases("learner"):
            if lease not in answered:
                answered.add(lease)
                received.append(lease.item)
                waiting.remove(lease.item)
                broker.say("learner", m.Complete(lease))
        work()
    assert received == sorted(received)
    assert len(received) == 300, "each once, none lost"
    assert max(peak_items) <= settings.queue_items
    largest_ticket = max(len(m.encode(ticket(number))) for number in range(300))
    assert max(peak_bytes) <= settings.queue_bytes + 14 * (largest_ticket + 200), "of items that grew in their stage"


def test_results_that_suddenly_are_much_larger_stay_within_the_bound_and_none_is_lost() -> None:
    """Leases are given out by the size of small results, and much larger ones come back."""
    size = 8 * 2 * 3000  # bytes of the two arrays of tokens of a large result
    broker = Broker(BrokerSettings(epoch=1, lease_s=1e6, queue_bytes=2 * size))
    broker.join("learner", credit=0)
    broker.join("actor-1", credit=6)
    stages, answered = broker.service.stages, set()

    def answer(peer: str, result: Callable[[int], m.Payload]) -> None:
        for lease in broker.leases(peer):
            if lease not in answered:
                answered.add(lease)
                broker.say(peer, m.Complete(lease), result(lease.item))
                assert all(stage.bytes < 3 * size + 10_000 for stage in stages.values()), "the bound, and one result"

    broker.submit(*range(6))
    answer("actor-1", lambda item: m.encode_rollout(rollout(item, 1)))
    broker.submit(*range(6, 20))
    answer("actor-1", lambda item: m.encode_rollout(rollout(item, 3000)))
    assert (len(stages["score"]), len(stages["rollout"])) == (8, 12), "the others of six found it full"
    broker.join("rewarder-1", credit=1)
    broker.say("learner", m.Serve("train", 1))
    while any(len(stage) for stage in stages.values()):
        broker.now += 1.0
        broker.heartbeat("actor-1")
        answer("actor-1", lambda item: m.encode_rollout(rollout(item, 3000)))
        answer("rewarder-1", lambda item: [m.encode(scores(item))])
        answer("learner", lambda item: ())
    assert sorted(lease.item for lease in broker.leases("learner")) == list(range(20)), "each once, none lost"
