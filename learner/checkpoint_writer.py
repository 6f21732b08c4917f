"""Writes checkpoints while training goes on: one thread, one checkpoint at a time, on every rank."""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from learner.checkpoint import CheckpointError, freeze, write_checkpoint
from learner.distributed import background_group
from learner.trainer import Trainer

logger = logging.getLogger(__name__)


class CheckpointWriter:
    """All ranks make one and call its methods together, in the same order.

    A checkpoint exists once it is complete; a process killed before leaves the one before it in force.

    Args:
        directory: where checkpoints go, visible to all ranks.
        keep: checkpoints kept.
    """

    def __init__(self, trainer: Trainer, directory: Path, keep: int) -> None:
        self._trainer = trainer
        self._directory = directory
        self._keep = keep
        self._group = background_group()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[Path] | None = None

    def save(self, blob: bytes) -> None:
        """Copy the state of this moment and begin to write it; waits for the checkpoint before, if need be.

        Raises:
            CheckpointError: the checkpoint before could not be written (the disk is full, no permission).
        """
        self.wait()
        state = freeze(self._trainer, blob)
        self._writing = self._thread.submit(write_checkpoint, state, self._directory, self._keep, self._group)

    def wait(self) -> Path | None:
        """Wait for the checkpoint that is being written; returns it, or None where none was.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._writing is None:
            return None
        writing, self._writing = self._writing, None
        path = writing.result()
        if self._trainer.leads:
            logger.info("checkpoint %s", path)
        return path

    def close(self) -> None:
        """End the thread, after the checkpoint it is writing; an error of that one is logged only."""
        try:
            self.wait()
        except CheckpointError as error:
            logger.error("the last checkpoint is missing: %s", error)
        self._thread.shutdown()
