"""The order of scoring against the learner's own ledger: what the learner waits for is always next."""

from __future__ import annotations

import random

import pytest

from common.score_order import place_of
from learner.ledger import TicketLedger

BATCH, STEPS = 4, 60


@pytest.mark.parametrize("max_staleness", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("scored_per_turn", [1, 3, 40])
def test_the_learner_never_waits_for_a_group_that_others_are_scored_before(
    max_staleness: int, scored_per_turn: int
) -> None:
    """Scoring takes as long as it takes; generating, some groups longer than others."""
    ledger, draw = TicketLedger(BATCH, max_staleness), random.Random(max_staleness)
    version, trained = 0, 0
    generating: dict[int, int] = {}  # position -> version
    waiting: dict[int, int] = {}
    while version < STEPS:
        for position in ledger.issue(ledger.admissible(version, version), version):
            generating[position] = version
        for position in [position for position in generating if draw.random() < 0.5]:
            waiting[position] = generating.pop(position)
        order = sorted(waiting, key=lambda position: place_of(waiting[position], position, evaluation=False))
        wanted = set(ledger.blocking(version))
        assert not wanted & set(order) or order[0] in wanted
        for position in order[: draw.randint(1, scored_per_turn)]:
            assert ledger.arrive(position, waiting.pop(position))
        while picked := ledger.take_batch(version):
            ledger.trained(picked)
            version, trained = version + 1, trained + len(picked)
    assert trained == BATCH * version


def test_held_out_groups_go_first_and_ties_by_ticket() -> None:
    groups = [(5, 1, False), (4, 9, False), (4, 8, False), (9, 7, True)]
    assert sorted(groups, key=lambda group: place_of(*group)) == [groups[3], groups[2], groups[1], groups[0]]
