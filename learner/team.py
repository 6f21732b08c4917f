"""Rank 0 leads, the other ranks follow: one word announces each collective operation before it is entered.

So no rank enters a collective the others do not know of, and a rank that waits for work holds nothing but a
broadcast on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from learner.checkpoint_writer import CheckpointWriter
from learner.distributed import broadcast_bytes
from learner.samples import TrainSample
from learner.trainer import Trainer


class Team:
    """The trainers of all ranks, driven from rank 0."""

    def __init__(self, trainer: Trainer, checkpoints: Path, keep: int) -> None:
        self.trainer = trainer
        self._writer = CheckpointWriter(trainer, checkpoints, keep)

    def step(self, samples: Sequence[TrainSample]) -> dict[str, float]:
        """One policy update; see `Trainer.step`."""
        broadcast_bytes(b"step")
        return self.trainer.step(samples)

    def full_state_dict(self) -> dict[str, Tensor]:
        """The whole policy, on rank 0."""
        broadcast_bytes(b"state")
        return self.trainer.full_state_dict()

    def save(self, blob: bytes) -> None:
        """Begin to write a checkpoint; see `CheckpointWriter.save`."""
        broadcast_bytes(b"save")
        self._writer.save(blob)

    def finish_saving(self) -> None:
        """Wait for the checkpoint that is being written; see `CheckpointWriter.wait`."""
        broadcast_bytes(b"wait")
        self._writer.wait()

    def dismiss(self) -> None:
        """Let the other ranks end."""
        broadcast_bytes(b"end")
        self._writer.close()

    def follow(self) -> None:
        """What every other rank does until it is dismissed.

        Raises:
            RuntimeError: rank 0 said a word this rank does not know (different versions of the code).
        """
        while True:
            match broadcast_bytes(None):
                case b"step":
                    self.trainer.step(None)
                case b"state":
                    self.trainer.full_state_dict()
                case b"save":
                    self._writer.save(b"")
                case b"wait":
                    self._writer.wait()
                case b"end":
                    self._writer.close()
                    return
                case word:
                    raise RuntimeError(f"rank 0 announced {word!r}: all ranks must run the same version")
