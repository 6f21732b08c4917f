"""Generated worlds, one file per task family: small, made of nothing but a seed, and hard for the obvious answers.

`data.corpus` names them; they are built on first use and cached under their name, format and seed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final


@dataclass(frozen=True, slots=True)
class World:
    """module: below this package, with a function `build_world(folder, seed)`. format: changes whenever the same seed
    gives another world.
    """

    module: str
    format: int

    def build(self, folder: Path, seed: int) -> Path:
        """Write the world as `folder`, which appears whole or not at all; returns it."""
        build_world: Callable[[Path, int], Path] = importlib.import_module(f"{__name__}.{self.module}").build_world
        return build_world(folder, seed)


WORLDS: Final[dict[str, World]] = {
    "demo": World("publications", 1),
    "demo-sql": World("sql", 1),
    "demo-evidence": World("evidence", 1),
    "demo-ranking": World("ranking", 1),
    "demo-trials": World("trials", 1),
}
