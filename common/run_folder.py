"""Where everything of one run lies: `runs/<name>/`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunFolder:
    """Names of the files and folders of a run; makes nothing by itself."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration all roles of the run read."""
        return self.path / "config.yaml"

    @property
    def keys(self) -> Path:
        """CURVE keys of the run (mode 0700)."""
        return self.path / "keys"

    @property
    def checkpoints(self) -> Path:
        """The learner's checkpoints."""
        return self.path / "checkpoints"

    @property
    def exports(self) -> Path:
        """Policies as Hugging Face folders (`deepretrieval export`)."""
        return self.path / "exports"

    @property
    def weights(self) -> Path:
        """Published policy versions, the newest few."""
        return self.path / "weights"

    @property
    def heldout(self) -> Path:
        """Held-out evaluations."""
        return self.path / "heldout"

    @property
    def logs(self) -> Path:
        """One log per process."""
        return self.path / "logs"

    @property
    def searches(self) -> Path:
        """Search results kept or recorded, where no other folder is named."""
        return self.path / "searches"

    @property
    def metrics(self) -> Path:
        """One line of figures per policy update."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """Trained samples, for reading by eye."""
        return self.path / "samples.jsonl"

    @property
    def dispositions(self) -> Path:
        """What became of every prompt position."""
        return self.path / "dispositions.jsonl"

    @property
    def summary(self) -> Path:
        """The run in figures, written at the end."""
        return self.path / "summary.json"
