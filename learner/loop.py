"""The learner's loop on rank 0: tickets out, groups in, one policy update, weights out, again.

Generation never waits for training here: tickets for the next steps are out while a step runs, as many as
`TicketLedger` admits. What a checkpoint holds (ledger, version, weights, optimizer) is the only durable truth of
a run; groups that were on their way are generated again after a restart.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import torch

from common import messages as m
from common.config import Config
from common.run_folder import RunFolder
from common.tasks import Row, Task
from common.tracking.dispositions_log import TRAINED
from common.tracking.heldout import write_heldout
from common.tracking.tracker import Tracker
from learner.connection import LearnerConnection
from learner.evaluation import Evaluation
from learner.fleet_figures import FleetFigures
from learner.ledger import LedgerState, TicketLedger
from learner.prompt_lengths import PROMPT_TOO_LONG, issue_fitting
from learner.prompts import PromptStream
from learner.samples import TrainSample
from learner.snapshot import write_snapshot
from learner.step_record import describe_groups, is_zero_variance, train_samples
from learner.team import Team
from learner.weight_server import WeightServer

logger = logging.getLogger(__name__)

WAIT_S = 0.2  # how often a wait looks at the stop request
ZERO_VARIANCE = "zero_variance"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class SupersededError(RuntimeError):
    """A newer learner leads this run; this one must not write anything any more."""


class LearnerState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The loop's part of a checkpoint.

    Attributes:
        incarnation: of the learner that wrote it; its successor's is larger.
        groups: scored groups that had arrived and were not trained yet (`encode_scored_group`).
        dispositions: lines of dispositions.jsonl.
    """

    incarnation: int
    version: int
    ledger: LedgerState
    groups: list[list[bytes]]
    dispositions: int
    evaluations: int
    totals: dict[str, float]


@dataclass
class Totals:
    """Counts over the whole run, restarts included."""

    trained_samples: float = 0.0
    trained_tokens: float = 0.0
    wait_s: float = 0.0
    step_s: float = 0.0
    dropped_stale: float = 0.0
    max_staleness_seen: float = 0.0
    wall_s: float = 0.0

    def summary(self) -> dict[str, float]:
        """The keys of summary.json that come from here."""
        return {
            "trained_samples": int(self.trained_samples),
            "dropped_stale": int(self.dropped_stale),
            "max_staleness_seen": int(self.max_staleness_seen),
            "learner_idle": self.wait_s / self.step_s if self.step_s else 0.0,
            "wall_s": self.wall_s,
        }


@dataclass
class LearnerParts:
    """What the loop drives; made by `learner.main`."""

    config: Config
    folder: RunFolder
    team: Team
    connection: LearnerConnection
    weights: WeightServer
    weights_key: str
    prompts: PromptStream
    heldout: list[Row]
    task: Task
    tracker: Tracker
    stop_requested: Callable[[], bool]
    resumed: LearnerState | None = None


@dataclass
class _Step:
    """Times of one step, in seconds."""

    wait_s: float = 0.0
    train_s: float = 0.0
    publish_s: float = 0.0
    figures: dict[str, float] = field(default_factory=dict)


class LearnerLoop:
    """One run, from its first (or resumed) version to its last."""

    def __init__(self, parts: LearnerParts) -> None:
        self._p = parts
        config, resumed = parts.config, parts.resumed
        self._learner = config.learner
        self.version = resumed.version if resumed else 0
        self.ledger = TicketLedger(
            config.learner.groups_per_step, config.learner.max_staleness, resumed.ledger if resumed else None
        )
        self.totals = Totals(**resumed.totals) if resumed else Totals()
        self._evaluations = resumed.evaluations if resumed else 0
        self._evaluation: Evaluation | None = None
        self._groups: dict[int, m.ScoredGroup] = {}  # here, and not trained yet
        self._hold_saved_groups(resumed.groups if resumed else [])
        self._filtered = 0
        quota = config.search.quota
        self._fleet = FleetFigures(quota.requests / quota.window_s if quota else None)
        self._started = time.monotonic() - self.totals.wall_s

    # ------------------------------------------------------------------ the run

    def run(self) -> bool:
        """Train to `learner.steps`; returns False where a stop was requested before.

        Raises:
            CheckpointError, OSError: the disk refused; earlier checkpoints are untouched.
        """
        self._publish()
        completed = self._train_to_the_end()
        self._p.team.finish_saving()
        if completed:
            self._finish()
        return completed

    def _train_to_the_end(self) -> bool:
        if self._p.resumed is None:
            if not self._evaluate_to_the_end("start"):
                return False
            self._checkpoint()  # a learner killed before the first regular one need not evaluate again
        while self.version < self._learner.steps:
            if not self._one_step():
                self._checkpoint()
                return False
        self._checkpoint()
        return self._evaluate_to_the_end("trained")

    def _hold_saved_groups(self, saved: list[list[bytes]]) -> None:
        for frames in saved:
            group = m.decode_scored_group(frames)
            self.ledger.hold(group.ticket.ticket_id, group.rollout.header.oldest_version)
            self._groups[group.ticket.ticket_id] = group

    def _one_step(self) -> bool:
        began = time.monotonic()
        step = _Step()
        groups = self._next_batch()
        if groups is None:
            return False
        step.wait_s = time.monotonic() - began
        self._issue(next_version=self.version + 1)  # generation goes on while this step trains
        self._p.connection.set_status(f"training step {self.version + 1}", "", {})
        step.figures = self._train(groups, step)
        step_s = time.monotonic() - began
        self._account(groups, step, step_s)
        self._log(groups, step, step_s)
        if self._learner.eval_every and self.version % self._learner.eval_every == 0:
            self._begin_evaluation()
        if self.version % self._learner.checkpoint_every == 0 and self.version < self._learner.steps:
            self._checkpoint()
        return True

    def _train(self, groups: list[m.ScoredGroup], step: _Step) -> dict[str, float]:
        samples: list[TrainSample] = [sample for group in groups for sample in train_samples(group)]
        began = time.monotonic()
        figures = self._p.team.step(samples)
        step.train_s = time.monotonic() - began
        self._require_lead()  # it may have been stopped for long: nothing of this step may be written then
        self.version += 1
        self._publish()
        step.publish_s = time.monotonic() - began - step.train_s
        self._p.connection.note_progress()
        return figures

    # ------------------------------------------------------------------ tickets and groups

    def _issue(self, next_version: int) -> None:
        count = self.ledger.admissible(self.version, next_version)
        remaining = (self._learner.steps - next_version) * self._learner.groups_per_step
        count = min(count, max(0, remaining - self.ledger.outstanding))
        prompts = self._p.prompts
        issued, too_long = issue_fitting(self.ledger, prompts.fits, count, self.version)
        for position in too_long:
            self._p.tracker.disposition(position, prompts.row(position).id, PROMPT_TOO_LONG, self.version)
        self._p.connection.submit([prompts.ticket(position, self.version) for position in issued])

    def _next_batch(self) -> list[m.ScoredGroup] | None:
        """Wait for a batch that may be trained at this version; None where a stop was requested."""
        while not self._p.stop_requested():
            self._issue(next_version=self.version)
            batch = self.ledger.take_batch(self.version)
            if batch is not None:
                self.ledger.trained(batch)
                return [self._groups.pop(position) for position in batch]
            self._p.connection.set_status(f"step {self.version + 1}", self._waits_for(), {})
            self._receive()
        return None

    def _waits_for(self) -> str:
        late = self.ledger.blocking(self.version)
        if late:
            return f"group {late[0]}, which would be too old at the next step ({len(late)} such)"
        return f"groups: {self.ledger.waiting} of {self._learner.groups_per_step} are here"

    def _receive(self) -> None:
        """Take what has come in, waiting a moment for the first."""
        self._require_lead()
        try:
            self._take(self._p.connection.groups.get(timeout=WAIT_S))
            while True:
                self._take(self._p.connection.groups.get_nowait())
        except queue.Empty:
            return

    def _require_lead(self) -> None:
        if self._p.connection.superseded.is_set():
            raise SupersededError("a newer learner leads this run: this one ends without a checkpoint")

    def _take(self, group: m.ScoredGroup) -> None:
        if group.ticket.kind == "eval":
            if self._evaluation is not None:
                self._evaluation.receive(group)
            return
        position, oldest = group.ticket.ticket_id, group.rollout.header.oldest_version
        if not self.ledger.is_expected(position):
            return  # delivered twice
        if not self.ledger.arrive(position, oldest):
            self.totals.dropped_stale += 1
            logger.error("group %d was generated with version %d, too old: generating it again", position, oldest)
            self._p.connection.submit([group.ticket])
            return
        if self._p.config.algorithm.filters_zero_variance and is_zero_variance(group):
            self._filtered += 1
            self.ledger.set_aside(position, ZERO_VARIANCE)
            self._p.tracker.disposition(position, group.ticket.prompt_id, ZERO_VARIANCE, self.version)
        else:
            self._groups[position] = group

    # ------------------------------------------------------------------ weights

    def _publish(self) -> None:
        state = self._p.team.full_state_dict()
        checksum = write_snapshot(state, self._p.weights.path_of(self.version), DTYPES[self._p.config.actor.dtype])
        self._p.weights.publish(self.version)
        self._p.connection.announce(self._run_state(checksum))

    def _run_state(self, checksum: str, finished: bool = False) -> m.RunState:
        incarnation = self._p.connection.incarnation
        return m.RunState(incarnation, self.version, self._p.weights.endpoint, self._p.weights_key, checksum, finished)

    # ------------------------------------------------------------------ evaluation

    def _begin_evaluation(self) -> None:
        if self._evaluation is not None:
            return  # the last one is not done yet: skip a round rather than flood the actors
        tokens = self._p.config.sampling.max_tokens
        self._evaluation = Evaluation(self._evaluations, self.version, self._p.heldout, self._p.task, tokens)
        self._evaluations += 1
        self._p.connection.submit(self._evaluation.tickets())

    def _evaluate_to_the_end(self, name: str) -> bool:
        """Evaluate the present version alone; False where a stop was requested."""
        self._evaluation = None
        self._begin_evaluation()
        assert self._evaluation is not None
        while not self._evaluation.done:
            if self._p.stop_requested():
                return False
            progress = f"{self._evaluation.answered} of {len(self._p.heldout)} held-out requests"
            self._p.connection.set_status(f"evaluating version {self.version}", progress, {})
            self._receive()
        result = self._evaluation.result()
        self._evaluation = None
        write_heldout(self._p.folder.heldout / f"{name}.json", result)
        self._p.tracker.log(self.version, {result.metric_key: result.interval().mean})
        return True

    def _harvest_evaluation(self) -> dict[str, float]:
        """The mean of an evaluation that has come to its end since the last step."""
        if self._evaluation is None or not self._evaluation.done:
            return {}
        result = self._evaluation.result()
        self._evaluation = None
        write_heldout(self._p.folder.heldout / f"v{result.version:08d}.json", result)
        return {result.metric_key: result.interval().mean}

    # ------------------------------------------------------------------ records

    def _account(self, groups: list[m.ScoredGroup], step: _Step, step_s: float) -> None:
        for group in groups:
            self._p.tracker.disposition(group.ticket.ticket_id, group.ticket.prompt_id, TRAINED, self.version - 1)
        samples = sum(len(group.scores.scores) for group in groups)
        self.totals.trained_samples += samples
        self.totals.trained_tokens += step.figures["tokens"]
        self.totals.wait_s += step.wait_s
        self.totals.step_s += step_s
        self.totals.wall_s = time.monotonic() - self._started

    def _log(self, groups: list[m.ScoredGroup], step: _Step, step_s: float) -> None:
        trained_at = self.version - 1
        metrics = describe_groups(groups, trained_at, self._p.task.metric)
        self.totals.max_staleness_seen = max(self.totals.max_staleness_seen, metrics["staleness/max"])
        arrived = len(groups) + self._filtered
        metrics |= {
            "version": float(self.version),
            "reward/zero_variance_share": self._filtered / arrived,
            "staleness/bound": float(self._learner.max_staleness),
            "idle/learner": step.wait_s / step_s,
            "timing/step_s": step_s,
            "timing/wait_s": step.wait_s,
            "timing/train_s": step.train_s,
            "timing/publish_s": step.publish_s,
            "tokens/trained_per_s": step.figures["tokens"] / step_s,
            "queue/outstanding": float(self.ledger.outstanding),
            "time/elapsed_s": self.totals.wall_s,
        }
        self._filtered = 0
        metrics |= {f"loss/{name}": value for name, value in step.figures.items()}
        metrics |= self._fleet.since_last(self._p.connection.fleet, step_s)
        if "tokens/generated_per_s" in metrics:
            metrics["goodput"] = metrics["tokens/trained_per_s"] / max(metrics["tokens/generated_per_s"], 1e-9)
        metrics |= self._harvest_evaluation()
        self._p.tracker.log(self.version, {"step": self.version, **metrics})
        self._log_samples(groups)

    def _log_samples(self, groups: list[m.ScoredGroup]) -> None:
        wanted = self._p.config.tracking.samples_per_step
        pairs = (
            (g, header, score)
            for g in groups
            for header, score in zip(g.rollout.header.samples, g.scores.scores, strict=True)
        )
        for _, (group, header, score) in zip(range(wanted), pairs, strict=False):
            self._p.tracker.sample(
                self.version,
                version=self.version - 1,
                ticket=group.ticket.ticket_id,
                oldest_version=min((span.version for span in header.spans), default=self.version - 1),
                prompt_id=group.ticket.prompt_id,
                request=group.ticket.reference["text"],
                text=header.text,
                query=score.query,
                reward=score.reward,
                **{self._p.task.metric: score.metrics.get(self._p.task.metric)},
            )

    def _checkpoint(self) -> None:
        """Begin to write the state of this moment; a later one waits for it."""
        self._p.tracker.sync()
        self._p.team.save(msgspec.msgpack.encode(self._state()))

    def _state(self) -> LearnerState:
        groups = [[bytes(frame) for frame in m.encode_scored_group(group)] for group in self._groups.values()]
        return LearnerState(
            incarnation=self._p.connection.incarnation,
            version=self.version,
            ledger=self.ledger.state(),
            groups=groups,
            dispositions=self._p.tracker.dispositions,
            evaluations=self._evaluations,
            totals={name: float(value) for name, value in vars(self.totals).items()},
        )

    def _finish(self) -> None:
        self._p.tracker.finish({"steps": self.version, **self.totals.summary(), "ledger": self.ledger.audit()})
        self._p.connection.announce(self._run_state("", finished=True))
