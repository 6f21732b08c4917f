"""The one object through which the learner reports: a line on disk for certain, W&B if it will."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from common.tracking.dispositions_log import DispositionsLog
from common.tracking.jsonl import encode_line
from common.tracking.metrics_log import MetricsLog
from common.tracking.samples_log import SamplesLog
from common.tracking.summary import update_summary
from common.tracking.wandb_tracker import ID_FILE, WandbOptions, WandbTracker, resolve_mode

_log = logging.getLogger(__name__)


class Tracker:
    """Fans the figures of a run out to metrics.jsonl, samples.jsonl, dispositions.jsonl, summary.json and W&B.

    Args:
        folder: the run's folder, `runs/<name>`.
        name: the run's name.
        config: the resolved config, for W&B (redacted there).
        wandb_mode: online, offline or off; WANDB_MODE overrides it.
        project, entity: W&B project and entity.
        resume_step: the step of the checkpoint the run goes on from; later lines of the logs are cut off.
            None starts anew: logs and summary of an earlier run in the folder move to `previous/`.
        resume_dispositions: lines of dispositions.jsonl at that checkpoint.
        warn: where warnings go; default: the log.

    Raises:
        ValueError: WANDB_MODE or `wandb_mode` is unknown, or dispositions.jsonl lacks lines of the checkpoint.
        OSError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        name: str,
        config: Mapping[str, object] | None = None,
        wandb_mode: str = "off",
        project: str = "deepretrieval",
        entity: str | None = None,
        resume_step: int | None = None,
        resume_dispositions: int = 0,
        warn: Callable[[str], None] = _log.warning,
    ) -> None:
        self.folder = Path(folder)
        mode = resolve_mode(wandb_mode)
        if resume_step is None:
            self._set_earlier_run_aside()
        self._metrics = MetricsLog(self.folder / "metrics.jsonl")
        self._samples = SamplesLog(self.folder / "samples.jsonl")
        if resume_step is not None:
            self._metrics.resume_at(resume_step)
            self._samples.resume_at(resume_step)
        self._dispositions = DispositionsLog(self.folder / "dispositions.jsonl", resume_dispositions)
        self._wandb: WandbTracker | None = None
        if mode != "off":
            options = WandbOptions(self.folder, name, project, entity, mode, dict(config or {}))
            self._wandb = WandbTracker(options, warn)

    def log(self, step: int, metrics: Mapping[str, object]) -> None:
        """Record the metrics of `step` (flat, grouped by slash: `reward/mean`).

        Raises:
            OSError: metrics.jsonl cannot be written (full disk).
            ValueError: `step` goes backwards.
        """
        plain = json.loads(encode_line(metrics))
        self._metrics.log(step, plain)
        if self._wandb is not None:
            self._wandb.log(step, plain)

    def sample(self, step: int, **fields: object) -> None:
        """Record one sample (`version, ticket, prompt_id, request, text, query, reward, …`). Raises OSError."""
        self._samples.sample(step, **fields)

    def disposition(self, ticket: int, prompt_id: str, disposition: str, version: int) -> None:
        """Record what became of a prompt position; see `DispositionsLog`. Raises OSError."""
        self._dispositions.record(ticket, prompt_id, disposition, version)

    @property
    def dispositions(self) -> int:
        """Dispositions recorded in the whole run."""
        return self._dispositions.lines

    def sync(self) -> None:
        """Force metrics and dispositions onto the disk; call it with each checkpoint."""
        self._metrics.sync()
        self._dispositions.sync()

    def finish(self, summary: Mapping[str, object]) -> None:
        """Merge `summary` into summary.json; close W&B (bounded wait) and the files."""
        update_summary(self.folder / "summary.json", summary)
        if self._wandb is not None:
            self._wandb.finish(json.loads(encode_line(summary)))
            self._wandb = None
        self._metrics.close()
        self._samples.close()
        self._dispositions.close()

    def _set_earlier_run_aside(self) -> None:
        for name in ("metrics.jsonl", "samples.jsonl", "dispositions.jsonl", "summary.json", ID_FILE):
            old = self.folder / name
            if old.exists():
                (self.folder / "previous").mkdir(exist_ok=True)
                old.replace(self.folder / "previous" / name)
