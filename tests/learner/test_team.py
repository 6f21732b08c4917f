"""Ranks that work together whoever is late, and that end together, with a name, when one of them fails."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import DeviceMesh

from deploy.ranks import run_ranks
from learner.checkpoint import latest_valid, load_checkpoint
from learner.distributed import initialize
from learner.rank_watch import Mark, stuck_ranks
from learner.samples import TrainSample
from learner.settings import TrainerSettings
from learner.trainer import Trainer

ROOT = Path(__file__).parents[2]
SampleMaker = Callable[..., list[TrainSample]]
# A large epsilon keeps Adam from turning rounding differences of tiny gradients into full steps.
GRPO = TrainerSettings(lr=0.1, adam_epsilon=0.1, kl_coef=0.1, micro_batch_tokens=64)
PPO = replace(GRPO, advantage="gae", critic="separate", critic_lr=0.1, critic_epochs=2, minibatches=2)
PLENTY_S = 600.0
ENDED_WITHIN_S = 60.0  # on a busy machine; a collective would wait for PLENTY_S


@pytest.fixture
def team(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    def run(what: str, settings: TrainerSettings = GRPO, ranks: int = 2, replicas: int = 1, bound_s: float = PLENTY_S):  # type: ignore[no-untyped-def]
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        worker = [sys.executable, str(ROOT / "tests" / "learner" / "team_worker.py")]
        arguments = [model_dir, tmp_path, json.dumps(asdict(settings)), replicas, bound_s, what]
        return run_ranks([*worker, *map(str, arguments)], ranks)

    return run


@pytest.mark.parametrize(
    ("ranks", "replicas", "settings"),
    [(2, 1, PPO), pytest.param(4, 2, GRPO, marks=pytest.mark.slow)],
    ids=["late", "late-hsdp"],
)
def test_ranks_that_come_late_to_every_operation_do_what_one_rank_does(
    mesh: DeviceMesh,
    model_dir: Path,
    tmp_path: Path,
    make_samples: SampleMaker,
    team: Callable[..., int],
    ranks: int,
    replicas: int,
    settings: TrainerSettings,
) -> None:
    assert team("late", settings, ranks, replicas) == 0
    alone = Trainer(settings, model_dir, mesh)
    figures = [alone.step(make_samples(seed)) for seed in range(3)][-1]
    theirs = json.loads((tmp_path / "figures.json").read_text())
    for name in ("loss", "grad_norm", "samples"):
        assert theirs[name] == pytest.approx(figures[name], rel=1e-3, abs=1e-5), name
    weights = load_file(tmp_path / "weights.safetensors")
    for name, tensor in alone.full_state_dict().items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-5, rtol=0)
    newest = latest_valid(tmp_path / "checkpoints")
    assert newest is not None
    fresh = Trainer(settings, model_dir, mesh)
    assert load_checkpoint(fresh, newest) == b"blob 2"
    restored, trained = fresh.named_tensors(), alone.named_tensors()
    for name in trained:
        torch.testing.assert_close(restored[name].full_tensor(), trained[name].full_tensor(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("what", "bound_s", "words"),
    [
        ("killed", PLENTY_S, ["rank 1 (process ", "was killed by SIGKILL"]),
        ("killed idle", PLENTY_S, ["rank 1 (process ", "was killed by SIGKILL"]),
        ("raises", PLENTY_S, ["rank 1 (process ", "failed: OutOfMemoryError: rank 1 asked for 3 GiB too many"]),
        ("stopped", 4.0, ["failed: StuckRankError: rank 1 is stuck", "(step) for 4 s (learner.collective_timeout_s)"]),
    ],
)
def test_a_rank_that_fails_ends_all_of_them_and_is_named(
    tmp_path: Path,
    team: Callable[..., int],
    capfd: pytest.CaptureFixture[str],
    what: str,
    bound_s: float,
    words: list[str],
) -> None:
    assert team(what, bound_s=bound_s) == 1
    ended_after_s = time.time() - (tmp_path / "steps").stat().st_mtime
    log = capfd.readouterr().err
    for word in words:
        assert word in log.splitlines()[-1], log
    assert (tmp_path / "steps").read_text() == ("2" if what == "killed idle" else "1")
    assert ended_after_s < ENDED_WITHIN_S


def test_who_is_stuck() -> None:
    own = Mark(operation=7, passes=3, beat=90)
    earlier = {
        0: Mark(7, 3, 80),  # waits too
        1: Mark(7, 2, 80),  # shows life, but does not move
        2: Mark(7, 3, 80),  # shows no life
        3: Mark(7, 1, 80),  # is behind, but moves
        4: Mark(),  # never posted
        5: Mark(6, 9, 80),  # has not come to this operation
    }
    marks = {
        0: Mark(7, 3, 85),
        1: Mark(7, 2, 85),
        2: Mark(7, 3, 80),
        3: Mark(7, 2, 85),
        4: Mark(),
        5: Mark(6, 9, 86),
    }
    assert stuck_ranks(own, earlier, marks) == [1, 2, 4, 5]


def test_replicas_divide_the_ranks(mesh: DeviceMesh) -> None:
    assert mesh.size() == 1
    with pytest.raises(ValueError, match="1 ranks cannot be 2 equal replicas"):
        initialize("cpu", replicas=2)
