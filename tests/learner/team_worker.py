"""One rank of a team; run by test_team.py under `deploy.ranks`, as the learner's ranks are.

Arguments: model folder, output folder, settings of the trainer as JSON, replicas, seconds of the collective
timeout, what happens to rank 1 in its second step: "late" (every rank is late for every operation), "killed",
"killed idle", "raises" or "stopped".
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from learner.distributed import failures_recorded, initialize, shutdown
from learner.rank_watch import RankWatch
from learner.settings import TrainerSettings
from learner.team import Team
from learner.trainer import Trainer
from tests.learner.conftest import random_samples

STEPS = 3
IDLE_S = 600.0
LATE_S = 0.15


class LateTeam(Team):
    """Each rank begins its part of each operation after a random pause of its own."""

    def _perform(self, word: str, part: Callable[[], object]) -> object:  # type: ignore[override]
        time.sleep(random.Random(f"{dist.get_rank()} {word} {self.trainer.steps}").uniform(0.0, LATE_S))
        return super()._perform(word, part)


def suffer(what: str, trainer: Trainer) -> None:
    """In the middle of a step: a forward pass that the others have begun."""

    def strike(*_: object) -> None:
        if trainer.steps != 1:
            return
        if what == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif what == "raises":
            raise torch.OutOfMemoryError("rank 1 asked for\n3 GiB too many")
        elif what == "killed idle":
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()

    trainer.policy.register_forward_pre_hook(strike, prepend=True)


def lead(team: Team, output: Path, what: str) -> None:
    for seed in range(STEPS):
        figures = team.step(random_samples(seed))
        team.full_state_dict()
        (output / "steps").write_text(str(seed + 1))
        if what == "killed idle" and seed == 1:
            time.sleep(IDLE_S)  # for the next batch
        team.save(b"blob %d" % seed)
    team.finish_saving()
    save_file(team.full_state_dict(), output / "weights.safetensors")
    (output / "figures.json").write_text(json.dumps(figures))
    team.dismiss()


def main(model_dir: str, output: Path, settings: TrainerSettings, replicas: int, bound_s: float, what: str) -> None:
    torch.set_num_threads(1)
    mesh = initialize("cpu", replicas, timedelta(seconds=bound_s))
    assert mesh.mesh_dim_names == (("replicate", "shard") if replicas > 1 else None)
    trainer = Trainer(settings, model_dir, mesh)
    with RankWatch(bound_s) as watch:
        team = (LateTeam if what == "late" else Team)(trainer, output / "checkpoints", 2, watch)
        if trainer.leads:
            lead(team, output, what)
        else:
            if mesh.get_rank() == 1:
                suffer(what, trainer)
            team.follow()


if __name__ == "__main__":
    try:
        with failures_recorded():
            main(
                sys.argv[1],
                Path(sys.argv[2]),
                TrainerSettings(**json.loads(sys.argv[3])),
                int(sys.argv[4]),
                float(sys.argv[5]),
                sys.argv[6],
            )
    finally:
        shutdown()
