"""The audit of a chaos run: it passes a record that balances, and names what is wrong with one that does not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.chaos_audit import Findings, Records, Rules, audit, ended_in, staleness, steps_between
from benchmarks.chaos_run import role_name
from learner.ledger import LedgerState

GROUP, BATCH, BOUND = 4, 3, 2
ASIDE = "zero_variance"
PROMPTS = ["p4", "p0", "p2", "p1", "p3"]  # one epoch; a prompt comes back five positions later
RULES = Rules(GROUP, BATCH, BOUND, lambda position: PROMPTS[position % len(PROMPTS)])
TRAINED_IN = {0: 0, 1: 0, 3: 0, 2: 1, 5: 1, 6: 1}  # ticket -> policy version
SET_ASIDE_AT = {4: 0, 8: 2}
OUTSTANDING = [7, 9]

Break = Callable[[dict[str, Any]], object]


def disposition(ticket: int, kind: str, version: int) -> dict[str, Any]:
    return {"ticket": ticket, "prompt_id": RULES.prompt_id_at(ticket), "disposition": kind, "version": version}


def sample(ticket: int, number: int) -> dict[str, Any]:
    version = TRAINED_IN[ticket]
    return {
        "step": version + 1,
        "version": version,
        "ticket": ticket,
        "oldest_version": max(0, version - 1),
        "prompt_id": RULES.prompt_id_at(ticket),
        "reward": float(number),
    }


def parts() -> dict[str, Any]:
    """A run of two updates, as it is read from the disk; the tests break it."""
    return {
        "version": 2,
        "cursor": 10,
        "outstanding": list(OUTSTANDING),
        "set_aside": {ASIDE: sorted(SET_ASIDE_AT)},
        "held": [9],
        "dispositions": [
            *(disposition(ticket, "trained", version) for ticket, version in TRAINED_IN.items()),
            *(disposition(ticket, ASIDE, version) for ticket, version in SET_ASIDE_AT.items()),
        ],
        "samples": [sample(ticket, number) for ticket in TRAINED_IN for number in range(GROUP)],
        "true": [float(number) for _ in TRAINED_IN for number in range(GROUP)],
    }


def findings_of(run: dict[str, Any]) -> Findings:
    ledger = LedgerState(run["cursor"], run["outstanding"], run["set_aside"])
    records = Records(run["version"], ledger, run["held"], run["dispositions"], run["samples"])
    return audit(records, RULES, run["true"])


def broken(change: Break) -> Findings:
    run = copy.deepcopy(parts())
    change(run)
    return findings_of(run)


def drop_ticket(run: dict[str, Any], ticket: int) -> None:
    run["dispositions"] = [line for line in run["dispositions"] if line["ticket"] != ticket]
    kept = [pair for pair in zip(run["samples"], run["true"], strict=True) if pair[0]["ticket"] != ticket]
    run["samples"], run["true"] = [line for line, _ in kept], [true for _, true in kept]


def add_sample(run: dict[str, Any], **fields: Any) -> None:
    run["samples"].append({**sample(0, 0), **fields})
    run["true"].append(0.0)


def test_a_record_that_balances_passes() -> None:
    found = findings_of(parts())
    assert found.balanced
    assert found == Findings([], [], [], [], [])


def test_a_run_that_was_stopped_before_its_first_step_balances() -> None:
    ledger = LedgerState(6, [0, 1, 2, 3, 4, 5], {})
    assert audit(Records(0, ledger, [], [], []), RULES, []).balanced


@pytest.mark.parametrize("ticket", [3, 8])
def test_a_position_nobody_can_account_for_is_lost(ticket: int) -> None:
    found = broken(lambda run: drop_ticket(run, ticket))
    assert found.lost == [ticket]
    assert found.inconsistent, "the ledger still counts it"


def test_a_position_that_is_forgotten_as_outstanding_is_lost() -> None:
    assert broken(lambda run: run["outstanding"].remove(7)).lost == [7]


@pytest.mark.parametrize(
    ("change", "ticket"),
    [
        (lambda run: run["dispositions"].append(disposition(1, "trained", 1)), 1),
        (lambda run: run["dispositions"].append(disposition(2, ASIDE, 0)), 2),
        (lambda run: run["outstanding"].append(5), 5),
        (lambda run: add_sample(run, step=2, version=1), 0),
        (lambda run: add_sample(run), 0),
    ],
    ids=["trained twice", "trained and set aside", "ended, to be issued again", "in two steps", "a sample too many"],
)
def test_what_counts_twice_is_named(change: Break, ticket: int) -> None:
    found = broken(change)
    assert found.duplicated == [ticket]
    assert found.lost == []


def test_an_invented_reward_is_named() -> None:
    found = broken(lambda run: run["samples"][5].update(reward=-4.0))
    assert len(found.wrong_reward) == 1
    assert "sample of ticket 1 in step 1: rewarded -4.0, worth 1.0" in found.wrong_reward
    assert found.inconsistent == []


@pytest.mark.parametrize(("oldest", "age"), [(-2, 3), (1, -1)])
def test_a_sample_older_than_promised_or_from_the_future_is_named(oldest: int, age: int) -> None:
    found = broken(lambda run: run["samples"][-1].update(version=1 if age > 0 else 0, oldest_version=oldest))
    assert [f"staleness {age}, promised {BOUND}" in line for line in found.too_stale] == [True]


def test_the_bound_itself_is_allowed() -> None:
    line = {**sample(6, 0), "version": 5, "oldest_version": 5 - BOUND}
    assert staleness(line) == BOUND
    assert broken(lambda run: run["samples"][-1].update(oldest_version=1 - BOUND)).too_stale == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda run: run["dispositions"][0].update(prompt_id="p9"), "carried prompt p9, not p4"),
        (lambda run: run["samples"][0].update(prompt_id="p9"), "prompt p9, the ticket's is p4"),
        (lambda run: run["samples"][0].update(version=1), "trained at version 1, the ticket at 0"),
        (lambda run: run["samples"][0].update(ticket=7), "ticket 7 in step 1: the ticket was not trained"),
        (lambda run: (run["samples"].pop(), run["true"].pop()), "ticket 6 was trained on 4 samples, 3 are recorded"),
        (lambda run: run["dispositions"].append(disposition(12, "trained", 1)), "never issued"),
        (lambda run: run["dispositions"][0].update(disposition=ASIDE), f"ticket 0 is {ASIDE} in the record"),
        (lambda run: run["dispositions"][0].update(disposition="vanished"), "ticket 0 is vanished"),
        (lambda run: run["dispositions"][-1].update(disposition="trained"), f"and {ASIDE} in the ledger"),
        (lambda run: run["set_aside"][ASIDE].remove(8), "the ledger counts 7 trained, the record 6"),
        (lambda run: run["set_aside"][ASIDE].append(1), f"the ledger counts 3 set_aside_{ASIDE}, the record 2"),
        (lambda run: run["held"].append(5), "keeps 1 groups of ticket 5"),
        (lambda run: run["held"].append(9), "keeps 2 groups of ticket 9"),
        (lambda run: run.update(version=3), "version 2 trained on 0 groups, not 3"),
        (lambda run: run.update(version=1), "version 1 trained on 3 groups, not 0"),
        (lambda run: run["dispositions"][0].update(version=1), "version 0 trained on 2 groups, not 3"),
    ],
)
def test_contradictions_are_named(change: Break, words: str) -> None:
    found = broken(change)
    assert any(words in line for line in found.inconsistent), found.inconsistent
    assert not found.balanced


def test_rewards_must_be_there_for_every_sample() -> None:
    with pytest.raises(ValueError, match="shorter"):
        broken(lambda run: run["true"].pop())


# ---------------------------------------------------------------------- throughput, processes


def step(version: int, time: float) -> dict[str, Any]:
    return {"step": version, "version": float(version), "time": time, "timing/step_s": 1.0}


def test_throughput_counts_the_steps_that_ended_inside_and_what_ended_in_them() -> None:
    evaluation = {"step": 0, "time": 99.0, "recall/heldout": 0.1}
    metrics = [evaluation, step(1, 100.0), step(2, 101.0), step(3, 110.0), step(4, 110.5)]
    inside = steps_between(metrics, 100.0, 110.0)
    assert [line["step"] for line in inside] == [2, 3]
    dispositions = [disposition(n, "trained", n // 2) for n in range(8)] + [disposition(8, ASIDE, 2)]
    assert ended_in(dispositions, inside) == {"trained": 4, ASIDE: 1}
    assert ended_in(dispositions, []) == {}


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("python -m deploy.cli actor run/config.yaml --connect tcp://h:1 --name actor-2 --parent 7", "actor-2"),
        ("python -m deploy.cli learner run/config.yaml --connect tcp://h:1 --resume=auto", "learner"),
        ("python -m deploy.cli broker run/config.yaml --port 5", "broker"),
        ("python -m deploy.cli search-server pubmed --corpus x", None),
        ("python -m deploy.cli train configs/demo.yaml", None),
        ("python -m deploy.cli", None),
        ("python deploy.cli actor --name actor-1", None),
        ("", None),
    ],
)
def test_roles_are_found_by_their_command_line(command: str, name: str | None) -> None:
    assert role_name(command.split()) == name
