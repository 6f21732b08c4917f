"""Does the account of a run balance? A pure function over what the run left on the disk.

Every position of the prompt stream that was issued must be outstanding or have exactly one disposition; every trained
ticket must have been trained on once, with the prompt of its position, young enough, and with the reward that its
texts are worth. What is found wrong is returned by name, so that a broken record says where to look.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from learner.ledger import LedgerState, TicketLedger

TRAINED = "trained"
Line = dict[str, Any]


@dataclass(frozen=True)
class Records:
    """The final lineage of a run: what is true once its newest checkpoint is.

    version: updates done at the checkpoint. ledger: of the same checkpoint. held: tickets of the groups it keeps,
    arrived and not trained yet. dispositions: lines of dispositions.jsonl with `ticket, prompt_id, disposition,
    version`. samples: lines of samples.jsonl with `step, version, ticket, oldest_version, prompt_id, reward, …`.
    """

    version: int
    ledger: LedgerState
    held: Sequence[int]
    dispositions: Sequence[Line]
    samples: Sequence[Line]


@dataclass(frozen=True)
class Rules:
    """What the run promised. prompt_id_at: the id of the request at a position of the prompt stream."""

    group_size: int
    groups_per_step: int
    max_staleness: int
    prompt_id_at: Callable[[int], str]


@dataclass(frozen=True)
class Findings:
    """What is wrong; all empty where the account balances.

    lost, duplicated: tickets. wrong_reward, too_stale: samples, in words. inconsistent: everything else that
    contradicts something.
    """

    lost: Sequence[int]
    duplicated: Sequence[int]
    wrong_reward: Sequence[str]
    too_stale: Sequence[str]
    inconsistent: Sequence[str]

    @property
    def balanced(self) -> bool:
        return not any(getattr(self, field.name) for field in fields(self))


def audit(records: Records, rules: Rules, true_rewards: Sequence[float]) -> Findings:
    """Check everything.

    Args:
        true_rewards: what the samples are worth, in their order, scored independently.
    """
    lines = Counter(int(line["ticket"]) for line in records.dispositions)
    outstanding = set(records.ledger.outstanding)
    issued = range(records.ledger.cursor)
    return Findings(
        lost=[position for position in issued if not lines[position] and position not in outstanding],
        duplicated=sorted(_duplicated(records, rules, lines, outstanding)),
        wrong_reward=[
            f"{_name(sample)}: rewarded {sample['reward']}, worth {true}"
            for sample, true in zip(records.samples, true_rewards, strict=True)
            if sample["reward"] != true
        ],
        too_stale=[
            f"{_name(sample)}: staleness {staleness(sample)}, promised {rules.max_staleness}"
            for sample in records.samples
            if not 0 <= staleness(sample) <= rules.max_staleness
        ],
        inconsistent=list(_inconsistencies(records, rules)),
    )


def staleness(sample: Line) -> int:
    """Policy versions between the oldest token of a sample and the update that used it."""
    return int(sample["version"]) - int(sample["oldest_version"])


def _name(sample: Line) -> str:
    return f"sample of ticket {sample['ticket']} in step {sample['step']}"


def _duplicated(records: Records, rules: Rules, lines: Counter[int], outstanding: set[int]) -> set[int]:
    """Tickets that ended twice, or ended and will be issued again, or were trained on twice."""
    steps: defaultdict[int, Counter[int]] = defaultdict(Counter)
    for sample in records.samples:
        steps[int(sample["ticket"])][int(sample["step"])] += 1
    ended_twice = {ticket for ticket, count in lines.items() if count > 1 or ticket in outstanding}
    trained_twice = {ticket for ticket, counts in steps.items() if len(counts) > 1 or counts.total() > rules.group_size}
    return ended_twice | trained_twice


# ---------------------------------------------------------------------- contradictions


def _inconsistencies(records: Records, rules: Rules) -> Iterator[str]:
    yield from _strange_dispositions(records, rules)
    yield from _ledger_differences(records, rules)
    yield from _uneven_batches(records, rules)
    yield from _strange_samples(records, rules)


def _strange_dispositions(records: Records, rules: Rules) -> Iterator[str]:
    rule_of = {ticket: rule for rule, tickets in records.ledger.set_aside.items() for ticket in tickets}
    for line in records.dispositions:
        ticket, disposition = int(line["ticket"]), line["disposition"]
        if not 0 <= ticket < records.ledger.cursor:
            yield f"ticket {ticket} was {disposition}, but never issued"
        elif line["prompt_id"] != rules.prompt_id_at(ticket):
            yield f"ticket {ticket} carried prompt {line['prompt_id']}, not {rules.prompt_id_at(ticket)}"
        if rule_of.get(ticket, TRAINED) != disposition:
            yield f"ticket {ticket} is {disposition} in the record and {rule_of.get(ticket, TRAINED)} in the ledger"


def _ledger_differences(records: Records, rules: Rules) -> Iterator[str]:
    """The ledger's own counts against those of the record."""
    ledger = TicketLedger(rules.groups_per_step, rules.max_staleness, records.ledger).audit()
    recorded = Counter(line["disposition"] for line in records.dispositions)
    names = {TRAINED: TRAINED, **{f"set_aside_{rule}": rule for rule in records.ledger.set_aside}}
    for in_ledger, in_record in names.items():
        if ledger[in_ledger] != recorded[in_record]:
            yield f"the ledger counts {ledger[in_ledger]} {in_ledger}, the record {recorded[in_record]}"
    for ticket, count in Counter(records.held).items():
        if count > 1 or ticket not in records.ledger.outstanding:
            state = "open" if ticket in records.ledger.outstanding else "not open"
            yield f"the checkpoint keeps {count} groups of ticket {ticket}, which is {state}"
    balance = ledger["issued"] - ledger["outstanding"] - sum(ledger[name] for name in names)
    if balance:
        yield f"the ledger itself does not balance: {ledger}"


def _uneven_batches(records: Records, rules: Rules) -> Iterator[str]:
    """Every version up to the last was made from one whole batch."""
    sizes = Counter(int(line["version"]) for line in records.dispositions if line["disposition"] == TRAINED)
    for version in sorted({*range(records.version), *sizes}):
        due = rules.groups_per_step if 0 <= version < records.version else 0
        if sizes[version] != due:
            yield f"version {version} trained on {sizes[version]} groups, not {due}"


def _strange_samples(records: Records, rules: Rules) -> Iterator[str]:
    trained = {int(line["ticket"]): line for line in records.dispositions if line["disposition"] == TRAINED}
    counts = Counter(int(sample["ticket"]) for sample in records.samples)
    for ticket in sorted(trained):
        if counts[ticket] < rules.group_size:
            yield f"ticket {ticket} was trained on {rules.group_size} samples, {counts[ticket]} are recorded"
    for sample in records.samples:
        line = trained.get(int(sample["ticket"]))
        if line is None:
            yield f"{_name(sample)}: the ticket was not trained"
        elif sample["prompt_id"] != line["prompt_id"]:
            yield f"{_name(sample)}: prompt {sample['prompt_id']}, the ticket's is {line['prompt_id']}"
        elif sample["version"] != line["version"]:
            yield f"{_name(sample)}: trained at version {sample['version']}, the ticket at {line['version']}"


# ---------------------------------------------------------------------- throughput


def steps_between(metrics: Sequence[Line], begin: float, end: float) -> list[Line]:
    """The policy updates that were finished in (begin, end], seconds since the epoch.

    metrics: lines of metrics.jsonl, final lineage: a step that a killed learner lost is not among them, or only
    as it was done again.
    """
    return [line for line in metrics if "timing/step_s" in line and begin < float(line["time"]) <= end]


def ended_in(dispositions: Sequence[Line], steps: Sequence[Line]) -> Counter[str]:
    """How many positions ended in these steps, by disposition; a step's `version` is the one it made."""
    versions = {int(step["version"]) - 1 for step in steps}
    return Counter(line["disposition"] for line in dispositions if int(line["version"]) in versions)
