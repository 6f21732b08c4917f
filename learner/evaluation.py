"""Held-out evaluation by the live fleet: greedy rollouts through the same actors and rewarders as training."""

from __future__ import annotations

from collections.abc import Sequence

from common import messages as m
from common.scores import InvalidOutput, Scored
from common.tasks import Row, Task
from common.tracking.heldout import RECALL, HeldoutResult, HeldoutRow
from learner.prompts import EVAL_TICKETS_FROM, make_ticket


class Evaluation:
    """One round over the held-out requests; answers come in any order, each counts once.

    Args:
        number: distinct per round of a run, so that answers of different rounds cannot be mixed up.
        version: policy version at its start. Actors never answer with older weights; while training goes on
            some may answer with newer ones.
    """

    def __init__(self, number: int, version: int, rows: Sequence[Row], task: Task, max_tokens: int) -> None:
        self.version = version
        self._rows = rows
        self._metric = task.metric
        self._first_id = EVAL_TICKETS_FROM + number * (1 << 24)
        self._answers: dict[int, HeldoutRow] = {}
        sampling = m.Sampling(samples=1, temperature=0.0, top_p=1.0, max_tokens=max_tokens)
        self._tickets = [
            make_ticket(self._first_id + index, "eval", row, task, sampling, min_version=version)
            for index, row in enumerate(rows)
        ]

    def tickets(self) -> list[m.Ticket]:
        """The tickets still without an answer."""
        return [ticket for ticket in self._tickets if ticket.ticket_id not in self._answers]

    @property
    def done(self) -> bool:
        """Whether every request has its answer."""
        return len(self._answers) == len(self._rows)

    @property
    def answered(self) -> int:
        """Requests with an answer."""
        return len(self._answers)

    def receive(self, group: m.ScoredGroup) -> bool:
        """Take an answer; False if it belongs to another round or is here already."""
        index = group.ticket.ticket_id - self._first_id
        if not 0 <= index < len(self._rows) or group.ticket.ticket_id in self._answers:
            return False
        row = self._rows[index]
        score = group.scores.scores[0]
        value = score.metrics.get(self._metric, 0.0) if isinstance(score, Scored) else 0.0
        self._answers[group.ticket.ticket_id] = HeldoutRow(
            id=row.id,
            request=row.text,
            text=group.rollout.header.samples[0].text,
            query=score.query or None if isinstance(score, Scored | InvalidOutput) else None,
            value=value,
            relevant=len(row.relevant) or None,
            hits=round(value * len(row.relevant)) if self._metric == RECALL else None,
        )
        return True

    def result(self) -> HeldoutResult:
        """All answers, in the order of the requests."""
        return HeldoutResult(self.version, [self._answers[key] for key in sorted(self._answers)], self._metric)
