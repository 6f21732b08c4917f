"""The ticket ledger and staleness admission: which prompts may be generated, which groups must be trained now.

A pure state machine: no socket, no clock; policy versions are its time. Each position of the prompt stream
(a prompt of an epoch) is one ticket, so a ticket id says which prompt it is, now and after any restart.

Invariants, after every call:

1. Positions below the cursor are either outstanding or have exactly one disposition: trained, or set aside by a
   named rule. `trained + set_aside + outstanding == cursor`.
2. **Bounded staleness.** With B groups per step and bound η, let the deadline of a group be η + the oldest
   version among its tokens (η + its `min_version` before it arrives; actors never generate with older weights).
   For every version d, the outstanding groups with deadline ≤ d number at most B·(d − next + 1), where `next` is
   the version at which the next batch is trained. So training earliest-deadline-first meets every deadline, and
   no group is ever too old when it is trained; nothing has to be thrown away for its age.
3. `take_batch` gives a batch only if (2) still holds for what remains: it waits for a straggler rather than let
   it expire, and otherwise trains whatever has arrived.

`max_staleness = 0` makes this the synchronous algorithm: B tickets a version, none while a step is running.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec


class LedgerState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a checkpoint keeps of the ledger. Everything below `cursor` that is in no list was trained."""

    cursor: int
    outstanding: list[int]
    set_aside: dict[str, list[int]]


@dataclass(slots=True)
class _Outstanding:
    oldest_version: int
    arrived: bool = False


class TicketLedger:
    """Issues tickets, receives groups, picks batches.

    Args:
        groups_per_step: B, groups trained per policy update.
        max_staleness: η, bound of (version trained at) − (oldest version among a group's tokens).
    """

    def __init__(self, groups_per_step: int, max_staleness: int, state: LedgerState | None = None) -> None:
        self._batch = groups_per_step
        self._bound = max_staleness
        self._outstanding: dict[int, _Outstanding] = {}
        self._cursor = state.cursor if state else 0
        self._unissued = sorted(state.outstanding) if state else []  # of an earlier learner: issued again first
        self._set_aside = {rule: set(ids) for rule, ids in state.set_aside.items()} if state else {}

    # ------------------------------------------------------------------ admission

    def admissible(self, published: int, next_version: int) -> int:
        """How many tickets may be issued now.

        Args:
            published: newest version whose weights actors can have; tickets get it as `min_version`.
            next_version: version at which the next batch will be trained (`published + 1` while a step runs).
        """
        room = (published + self._bound - next_version + 1) * self._batch - len(self._outstanding)
        return max(0, room)

    def issue(self, count: int, published: int) -> list[int]:
        """Issue `count` tickets with `min_version = published`; returns their positions, oldest first."""
        again, self._unissued = self._unissued[:count], self._unissued[count:]
        fresh = list(range(self._cursor, self._cursor + count - len(again)))
        self._cursor += len(fresh)
        for position in again + fresh:
            self._outstanding[position] = _Outstanding(oldest_version=published)
        return again + fresh

    # ------------------------------------------------------------------ groups

    def hold(self, position: int, oldest_version: int) -> None:
        """A group that had arrived before a restart and was kept in the checkpoint: it is not generated again.

        Raises:
            ValueError: its ticket is not open in the state this ledger started from.
        """
        if position not in self._unissued:
            raise ValueError(f"group {position} is kept in the checkpoint, but its ticket is not outstanding")
        self._unissued.remove(position)
        self._outstanding[position] = _Outstanding(oldest_version, arrived=True)

    def is_expected(self, position: int) -> bool:
        """Whether a group for this ticket would be new: outstanding and not here yet."""
        entry = self._outstanding.get(position)
        return entry is not None and not entry.arrived

    def arrive(self, position: int, oldest_version: int) -> bool:
        """A scored group came in. False if it is a duplicate, unknown, or older than its ticket allows."""
        entry = self._outstanding.get(position)
        if entry is None or entry.arrived or oldest_version < entry.oldest_version:
            return False
        entry.arrived = True
        entry.oldest_version = oldest_version
        return True

    def set_aside(self, position: int, rule: str) -> None:
        """End an outstanding ticket without training on it, by the rule named."""
        del self._outstanding[position]
        self._set_aside.setdefault(rule, set()).add(position)

    def take_batch(self, version: int) -> list[int] | None:
        """The groups to train at `version`, in order of position, or None: wait for more.

        Picks B arrived groups, earliest deadline first. The tickets stay outstanding until `trained`.
        """
        picked = self._earliest_due()
        if picked is None or self._first_missed(picked, version + 1) is not None:
            return None
        return sorted(picked)

    def trained(self, batch: Iterable[int]) -> None:
        """These groups were trained on: their tickets end here."""
        for position in batch:
            del self._outstanding[position]

    def blocking(self, version: int) -> list[int]:
        """Where enough groups are here and `take_batch` still waits: the tickets one of which it waits for."""
        picked = self._earliest_due()
        missed = None if picked is None else self._first_missed(picked, version + 1)
        if missed is None:
            return []
        return sorted(
            p for p, e in self._outstanding.items() if not e.arrived and e.oldest_version + self._bound <= missed
        )

    # ------------------------------------------------------------------ state

    @property
    def outstanding(self) -> int:
        """Tickets issued and not ended."""
        return len(self._outstanding)

    @property
    def waiting(self) -> int:
        """Groups here that no batch has taken yet."""
        return sum(entry.arrived for entry in self._outstanding.values())

    def audit(self) -> dict[str, int]:
        """Counts of invariant 1: issued positions and what became of them."""
        aside = {f"set_aside_{rule}": len(ids) for rule, ids in self._set_aside.items()}
        open_tickets = len(self._outstanding) + len(self._unissued)
        trained = self._cursor - open_tickets - sum(aside.values())
        return {"issued": self._cursor, "outstanding": open_tickets, "trained": trained, **aside}

    def state(self) -> LedgerState:
        """What a checkpoint must hold. Groups here but not trained count as outstanding (see `hold`)."""
        rules = {rule: sorted(ids) for rule, ids in self._set_aside.items()}
        return LedgerState(self._cursor, sorted([*self._outstanding, *self._unissued]), rules)

    def _earliest_due(self) -> set[int] | None:
        """A batch of the groups that are here, earliest deadline first; None where there are too few."""
        arrived = sorted((e.oldest_version, position) for position, e in self._outstanding.items() if e.arrived)
        return {position for _, position in arrived[: self._batch]} if len(arrived) >= self._batch else None

    def _first_missed(self, picked: set[int], next_version: int) -> int | None:
        """The first deadline that the tickets not picked could no longer all meet; None: they can meet all."""
        rest = (e.oldest_version for position, e in self._outstanding.items() if position not in picked)
        due = Counter(oldest + self._bound for oldest in rest)
        total = 0
        for deadline in sorted(due):
            total += due[deadline]
            if total > self._batch * max(0, deadline - next_version + 1):
                return deadline
        return None
