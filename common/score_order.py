"""Which group is scored next: one rule for the broker's queue and for the quota inside a rewarder.

Groups begun are finished first; whoever keeps the order knows which those are. Then come the held-out groups, and then
the training groups by their deadlines, earliest first.

Why not the freshest first? Nothing here is thrown away for its age: tickets are issued until as many groups are under
way as can all be trained in time (`learner.ledger`, invariant 2), so at any time the next batch has to be the groups
with the earliest deadlines, and the learner waits for them. A fresher group scored before them is not trained earlier.
The mean staleness does not depend on the order either (Little's law: it is the groups under way over those trained a
step). What is left of freshness is that nothing is spent on a group that is void.
"""

from __future__ import annotations


def place_of(version: int, ticket: int, evaluation: bool) -> tuple[int, ...]:
    """The place of a group that is not begun; smaller goes first.

    version: oldest policy version among its tokens; `max_staleness` later is its deadline. ticket: its number; earlier
    ones go first among equals. evaluation: a held-out group.
    """
    return (0 if evaluation else 1, version, ticket)
