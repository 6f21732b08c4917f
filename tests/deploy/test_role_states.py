"""Health: a role is judged by its progress, and its trouble is told once when it begins and once when it ends."""

from __future__ import annotations

from typing import Any

from common.messages import PeerEntry, PeerStatus, StageStatus, StatusReply
from common.off_peak import WAITS_FOR
from deploy.role_states import DEAF_AFTER_S, SERVES_WITHIN_S, SILENT_AFTER_S, Health, RoleState, RoleView


def reply(*peers: PeerEntry) -> StatusReply:
    stages: Any = {"rollout": StageStatus(0, 0, 0, 0, 0)}
    return StatusReply(stages, peers, 0, 0, 0)


def entry(name: str = "actor-0", silent_s: float = 0.1, waits_for: str = "", age_s: float = 0.0) -> PeerEntry:
    role: Any = name.split("-")[0]
    return PeerEntry(name, role, 3, silent_s, PeerStatus("generating", waits_for, age_s))


def view(name: str = "actor-0", **known: Any) -> RoleView:
    return RoleView(name, name.split("-")[0], **{"returncode": None, "lived_s": 60.0, **known})


def one_state(role: RoleView, fleet: StatusReply | None, health: Health | None = None) -> RoleState:
    (state,) = (health or Health()).states([role], fleet)
    return state


def test_waiting_without_progress_is_a_stall_and_names_what_is_waited_for() -> None:
    state = one_state(view(), reply(entry(waits_for="tickets", age_s=40.0)))
    assert (state.state, state.waits_for, state.since_s, state.leases) == ("stalled", "tickets", 40.0, 3)
    assert state.trouble == "waits for tickets, no progress for 40 s"
    assert one_state(view(), reply(entry(waits_for="tickets", age_s=20.0))).state == "running"
    assert one_state(view(), reply(entry(age_s=400.0))).state == "running", "it is busy, with something long"


def test_waiting_for_the_night_is_no_stall() -> None:
    state = one_state(view("rewarder-0"), reply(entry("rewarder-0", waits_for=WAITS_FOR, age_s=4000.0)))
    assert (state.state, state.waits_for) == ("running", "NCBI's off-peak hours (from 21:00 US Eastern)")


def test_without_heartbeats_a_role_is_silent() -> None:
    state = one_state(view(), reply(entry(silent_s=SILENT_AFTER_S + 1)))
    assert (state.state, state.since_s) == ("silent", SILENT_AFTER_S + 1)


def test_a_role_the_broker_never_met_is_starting_one_it_forgot_is_silent() -> None:
    health = Health()
    assert one_state(view(lived_s=50.0), reply(), health).state == "starting"
    assert one_state(view(lived_s=51.0), reply(entry()), health).state == "running"
    assert one_state(view(lived_s=55.0), reply(), health).state == "running"
    state = one_state(view(lived_s=51.0 + SILENT_AFTER_S + 1), reply(), health)
    assert (state.state, state.since_s) == ("silent", SILENT_AFTER_S + 1)
    assert one_state(view(lived_s=1.0), reply(), health).state == "starting", "its process is a new one"


def test_the_entry_of_an_earlier_process_says_nothing_about_the_new_one() -> None:
    assert one_state(view(lived_s=2.0), reply(entry(silent_s=20.0))).state == "starting"
    (state,) = Health().states([view(lived_s=2.0)], reply(entry(silent_s=1.8)), fleet_age_s=0.9)
    assert state.state == "starting", "the answer itself is old"


def test_a_learner_is_found_under_the_name_of_its_incarnation() -> None:
    peers = reply(entry("learner-1700", silent_s=30.0), entry("learner-1800", waits_for="groups", age_s=1.0))
    state = one_state(view("learner"), peers)
    assert (state.name, state.peer, state.state) == ("learner", "learner-1800", "running")


def test_ends_of_processes() -> None:
    assert one_state(view(returncode=0), None).state == "stopped"
    assert one_state(view(returncode=-9), reply(entry())).state == "dead"


def test_who_is_asked_to_leave_shows_it() -> None:
    state = one_state(view(leaving=True), reply(entry()))
    assert state.leaving
    assert state.phase == "leaving, generating"


def test_broker_and_search_server_are_judged_by_their_answers() -> None:
    def broker(lived_s: float, deaf_s: float) -> RoleState:
        return one_state(view("broker", lived_s=lived_s, deaf_s=deaf_s), None)

    assert broker(1.0, float("inf")).state == "starting"
    assert broker(100.0, 1.0).state == "running"
    assert broker(5.0, 8.0).state == "starting", "what answered was its predecessor"
    deaf = broker(100.0, DEAF_AFTER_S + 1)
    assert (deaf.state, deaf.trouble) == ("stalled", "answers no status request")
    assert broker(SERVES_WITHIN_S + 1, float("inf")).state == "stalled", "it never came up"
    server = one_state(view("search-server", lived_s=100.0, deaf_s=60.0), None)
    assert server.trouble == "accepts no connection"


def test_what_keeps_a_role_from_running_is_its_phase() -> None:
    state = one_state(view(note="waits for a node with 1 CPUs to spare"), None)
    assert (state.state, state.phase) == ("starting", "waits for a node with 1 CPUs to spare")


def test_trouble_is_told_once_and_so_is_its_end() -> None:
    health = Health()
    stalled = RoleState("actor-0", "actor", "stalled", waits_for="tickets", since_s=31.0)
    well = RoleState("actor-0", "actor", "running")
    assert health.news([well], 0.0) == []
    assert health.news([stalled], 1.0) == ["actor-0 is stalled: waits for tickets, no progress for 31 s"]
    assert health.news([stalled], 2.0) == []
    assert health.news([well], 46.0) == ["actor-0 is well again after 45 s"]
    assert health.news([well], 47.0) == []
    assert len(health.news([stalled], 48.0)) == 1
    assert health.news([], 50.0) == ["actor-0 is well again after 2 s"], "or it is gone"
