"""The disk fills up in mid-run: one clear line, nothing broken, and the run goes on once there is room."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.deploy.small_disk import fill, needs_mount, small_disk
from tests.deploy.small_run import SMALL, SmallRun

SETTINGS = (*SMALL, "learner.keep_checkpoints=2")


@needs_mount
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_disk_that_fills_up_ends_the_run_with_one_line_and_resume_goes_on(demo_folder: Path) -> None:
    with small_disk(demo_folder / "runs" / "full", "96m") as disk:
        run = SmallRun(demo_folder, "full", [*SETTINGS, "learner.steps=1000"]).start()
        try:
            run.wait_for_step(3)
            filler = fill(disk)
            output = run.finish(status=1, seconds=120)
        finally:
            run.end()
        errors = [line for line in output.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, output
        assert "no space left" in errors[0]
        assert "--resume" in errors[0]
        assert run.processes() == []
        for log in run.folder.logs.glob("*.log"):
            assert "Traceback" not in log.read_text(), log
        filler.unlink()
        steps = run.step() + 2
        resumed = SmallRun(demo_folder, "full", [*SETTINGS, f"learner.steps={steps}"], ("train", "--resume")).start()
        try:
            resumed.finish()
        finally:
            resumed.end()
        resumed.assert_balanced(steps)
