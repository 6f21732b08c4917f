"""The prompt stream: which request stands at which position, for ever the same."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache

from common import messages as m
from common.tasks import Row, Task
from common.tasks.row import to_reference

EVAL_TICKETS_FROM = 1 << 48  # ids of evaluation tickets; positions of the prompt stream stay below


class PromptStream:
    """Position p is a request of epoch p // N in that epoch's own random order.

    Args:
        rows: the N training requests.
        sampling: how groups are drawn; its seed makes equal runs equal.
        seed: of the epochs' orders.
        too_long: ids of the requests whose prompt the engine cannot take; they keep their positions.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        task: Task,
        sampling: m.Sampling,
        seed: int,
        too_long: frozenset[str] = frozenset(),
    ) -> None:
        if not rows:
            raise ValueError("there is no training request: data.train_split has no judged request")
        if all(row.id in too_long for row in rows):
            raise ValueError("every prompt is too long for the engine: raise actor.max_model_len")
        for row in rows:
            task.check_row(row)
        self._rows = rows
        self._task = task
        self._sampling = sampling
        self._seed = seed
        self._too_long = too_long
        self._order = lru_cache(maxsize=4)(self._shuffled)

    def row(self, position: int) -> Row:
        """The request at a position."""
        return self._rows[self._order(position // len(self._rows))[position % len(self._rows)]]

    def fits(self, position: int) -> bool:
        """Whether the engine can take the prompt at a position."""
        return self.row(position).id not in self._too_long

    def ticket(self, position: int, min_version: int) -> m.Ticket:
        """The ticket of a position; `min_version` is the newest published version."""
        epoch = position // len(self._rows)
        return make_ticket(
            position, "train", self.row(position), self._task, self._sampling, epoch=epoch, min_version=min_version
        )

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(len(self._rows)))
        random.Random(f"{self._seed}:{epoch}").shuffle(order)
        return order


def make_ticket(
    ticket_id: int,
    kind: str,
    row: Row,
    task: Task,
    sampling: m.Sampling,
    *,
    epoch: int = 0,
    min_version: int = 0,
) -> m.Ticket:
    """A ticket that carries everything actor and rewarder need to know of a request."""
    return m.Ticket(
        ticket_id=ticket_id,
        kind="eval" if kind == "eval" else "train",
        prompt_id=row.id,
        epoch=epoch,
        messages=tuple(m.ChatMessage(**message) for message in task.messages(row)),
        reference=to_reference(row),
        sampling=sampling,
        min_version=min_version,
    )
