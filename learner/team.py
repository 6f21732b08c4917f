"""Rank 0 leads, the other ranks follow: one word announces each collective operation before it is entered.

So no rank enters a collective the others do not know of, and a rank that waits for work holds nothing but a
broadcast on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from learner.checkpoint_writer import CheckpointWriter
from learner.distributed import broadcast_bytes
from learner.rank_watch import RankWatch
from learner.samples import TrainSample
from learner.trainer import Trainer

_Result = TypeVar("_Result")


class Team:
    """The trainers of all ranks, driven from rank 0. All ranks make one; rank 0 calls, the others `follow`."""

    def __init__(self, trainer: Trainer, checkpoints: Path, keep: int, watch: RankWatch) -> None:
        self.trainer = trainer
        self._writer = CheckpointWriter(trainer, checkpoints, keep)
        self._watch = watch
        # Each once: with adapters the policy is its own reference.
        models = (trainer.policy, trainer.critic, trainer.reference)
        for model in {model for model in models if model is not None}:
            # Before FSDP's own hook, which is where a rank waits for the others.
            model.register_forward_pre_hook(watch.begin_pass, prepend=True)

    def step(self, samples: Sequence[TrainSample]) -> dict[str, float]:
        """One policy update; see `Trainer.step`."""
        return self._lead("step", lambda: self.trainer.step(samples))

    def full_state_dict(self) -> dict[str, Tensor]:
        """The whole policy, on rank 0."""
        return self._lead("state", self.trainer.full_state_dict)

    def save(self, blob: bytes) -> None:
        """Begin to write a checkpoint; see `CheckpointWriter.save`."""
        self._lead("save", lambda: self._writer.save(blob))

    def finish_saving(self) -> None:
        """Wait for the checkpoint that is being written; see `CheckpointWriter.wait`."""
        self._lead("wait", self._writer.wait)

    def dismiss(self) -> None:
        """Let the other ranks end."""
        self._lead("end", self._writer.close)

    def follow(self) -> None:
        """What every other rank does until it is dismissed.

        Raises:
            RuntimeError: rank 0 said a word this rank does not know (different versions of the code).
        """
        own_part: dict[str, Callable[[], object]] = {
            "step": lambda: self.trainer.step(None),
            "state": self.trainer.full_state_dict,
            "save": lambda: self._writer.save(b""),
            "wait": self._writer.wait,
            "end": self._writer.close,
        }
        word = ""
        while word != "end":
            word = broadcast_bytes(None).decode()
            if word not in own_part:
                raise RuntimeError(f"rank 0 announced {word!r}: all ranks must run the same version")
            self._perform(word, own_part[word])

    def _lead(self, word: str, part: Callable[[], _Result]) -> _Result:
        broadcast_bytes(word.encode())
        return self._perform(word, part)

    def _perform(self, word: str, part: Callable[[], _Result]) -> _Result:
        with self._watch.operation(word):
            return part()
