"""The limit of open files: a role takes what it is allowed, and thousands of sockets fit into it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from deploy import checks
from deploy.open_files import ENOUGH, open_files_allowed
from tests.deploy.small_run import ROOT

resource = pytest.importorskip("resource")
HARD = 4321
SHOW = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (256, {HARD}))
from deploy import cli
cli._parse = lambda argv: type("Arguments", (), {{"handler": lambda arguments: print(
    *resource.getrlimit(resource.RLIMIT_NOFILE)) or 0}})
cli.main([])
"""


def test_every_command_raises_its_soft_limit_to_the_hard_one() -> None:
    done = subprocess.run([sys.executable, "-c", SHOW], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(HARD), str(HARD)]


@pytest.mark.parametrize(
    ("allowed", "status", "detail"),
    [(1024, "warning", "1024 allowed"), (ENOUGH, "OK", f"{ENOUGH} allowed"), (None, "OK", "unlimited")],
)
def test_the_doctor_judges_what_a_role_can_have(
    monkeypatch: pytest.MonkeyPatch, allowed: int | None, status: str, detail: str
) -> None:
    allow: Callable[[], int | None] = lambda: allowed  # noqa: E731
    monkeypatch.setattr(checks, "open_files_allowed", allow)
    (check,) = [check for check in checks.run_checks() if check.name == "open files"]
    assert (check.status, check.detail) == (status, detail)
    assert ("hard limit" in check.advice) == (status == "warning")


def test_the_limit_of_this_process_is_the_hard_one() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert open_files_allowed() == (None if hard == resource.RLIM_INFINITY else hard)
