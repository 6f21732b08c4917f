"""At `max_staleness: 0` a learner killed at any moments ends with the weights of an undisturbed one, bit for bit."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from learner.checkpoint import latest_valid
from tests.deploy.small_run import SMALL, SmallRun

STEPS, KILLS = 16, 5
SETTINGS = (
    *SMALL,
    "actor.count=2",
    "sampling.max_tokens=24",
    "data.heldout_limit=4",
    "learner.max_staleness=0",
    f"learner.steps={STEPS}",
    "learner.checkpoint_every=3",
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def kill_learner_at_random_moments(run: SmallRun, seed: int) -> None:
    """SIGKILL it some moment after each of `KILLS` random steps is reached, the first checkpoint behind it."""
    chance = random.Random(seed)
    run.wait_for(lambda: latest_valid(run.folder.checkpoints) is not None)
    for target in sorted(chance.sample(range(4, STEPS - 1), KILLS)):
        run.wait_for_step(target)
        time.sleep(chance.uniform(0.0, 0.8))
        run.kill("learner")


def test_five_kills_change_not_one_bit(demo_folder: Path) -> None:
    calm, struck = (SmallRun(demo_folder, name, SETTINGS) for name in ("bits-calm", "bits-struck"))
    try:
        calm.start().finish()
        struck.start()
        kill_learner_at_random_moments(struck, seed=11)
        struck.finish()
    finally:
        calm.end()
        struck.end()
    struck.assert_balanced(STEPS)
    assert struck.launcher_log().count("learner is started again, it was killed by SIGKILL") == KILLS
    # One that is killed while it starts does not come to say it.
    assert 1 < (struck.folder.logs / "learner.log").read_text().count("resuming from") <= KILLS
    assert struck.fingerprint(STEPS) == calm.fingerprint(STEPS)
