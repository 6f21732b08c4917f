"""`deepretrieval export`, as a user meets it: from a run's folder to a model with its card."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from common.config import load_config, to_yaml
from common.run_folder import RunFolder
from common.tracking.heldout import HeldoutResult, HeldoutRow, write_baselines, write_heldout
from deploy.cli import main
from deploy.model_card import base_model_name
from tests.tiny_model import build_tiny_model

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "demo.yaml"
# In a process of its own, as in life: the process group that saved a checkpoint is gone when it is exported.
SAVE = """
import sys
from pathlib import Path
from learner.checkpoint import save_checkpoint
from learner.distributed import initialize, shutdown
from learner.settings import TrainerSettings
from learner.trainer import Trainer

folder = Path(sys.argv[1])
trainer = Trainer(TrainerSettings(kl_coef=0.0), folder / "model", initialize("cpu"))
for step in (20, 40):
    trainer.steps = step
    save_checkpoint(trainer, folder / "checkpoints", b"")
shutdown()
"""


def heldout(version: int, values: list[float]) -> HeldoutResult:
    return HeldoutResult(version, [HeldoutRow(str(i), "request", "", "q", value) for i, value in enumerate(values)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and checkpoints of the steps 20 and 40."""
    folder = tmp_path_factory.mktemp("trained")
    build_tiny_model(folder / "model")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", SAVE, str(folder)], env=environment, check=True, timeout=120)
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> RunFolder:
    """The folder of a run with those checkpoints, evaluated at 0, 20 and 30."""
    folder = RunFolder(tmp_path / "runs" / "tiny")
    shutil.copytree(trained / "checkpoints", folder.checkpoints)
    overrides = [f"model.path={trained / 'model'}", "run.name=tiny", "search.email=someone@example.org"]
    folder.config.write_text(to_yaml(load_config(CONFIG, overrides)))
    write_heldout(folder.heldout / "start.json", heldout(0, [0.0, 0.5] * 10))
    write_heldout(folder.heldout / "v20.json", heldout(20, [0.25, 0.5] * 10))
    write_heldout(folder.heldout / "v30.json", heldout(30, [0.5, 0.5] * 10))
    write_baselines(folder.heldout / "baselines.json", {"original": [0.125] * 20})
    return folder


def export(run: RunFolder, *options: str) -> int:
    return main(["export", str(run.path), *options])


def test_the_newest_step_becomes_a_model_with_a_card(
    run: RunFolder, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(run) == 0
    target = run.exports / "step-00000040"
    assert capsys.readouterr().out.splitlines()[-1] == str(target)
    names = {entry.name for entry in target.iterdir()}
    assert names >= {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "README.md"}
    card = (target / "README.md").read_text()
    metadata, body = card.removeprefix("---\n").split("---\n", 1)
    assert yaml.safe_load(metadata)["tags"] == [
        "deepretrieval",
        "reinforcement-learning",
        "query-rewriting",
        "publication_search",
    ]
    assert "| **step 30** | 0.5000 | 0.5000 to 0.5000 |" in body
    assert "10 steps older" in body
    assert "| before training | 0.2500 |" in body
    assert "| raw request | 0.1250 |" in body
    assert "entropy_coef: 0.01" in body
    for private in ("someone@example.org", str(trained), str(run.path)):
        assert private not in card


def test_step_folder_and_dtype_are_chosen(run: RunFolder, tmp_path: Path) -> None:
    assert export(run, "--step", "20", "--to", str(tmp_path / "mine"), "--dtype", "bfloat16") == 0
    assert json.loads((tmp_path / "mine" / "config.json").read_text())["dtype"] == "bfloat16"
    assert "| **step 20** | 0.3750 |" in (tmp_path / "mine" / "README.md").read_text()


def test_a_step_that_is_not_there_names_those_that_are(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(run, "--step", "30") == 1
    assert "available: 20, 40" in capsys.readouterr().err
    (run.checkpoints / "step-00000040" / "manifest.json").unlink()
    assert export(run, "--step", "40") == 1
    assert "damaged" in capsys.readouterr().err
    assert not run.exports.exists()
    assert export(run) == 0
    assert (run.exports / "step-00000020").is_dir(), "the newest undamaged one"


def test_a_model_is_replaced_only_by_force_and_nothing_else_ever(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, papers = tmp_path / "out", tmp_path / "papers"
    papers.mkdir()
    (papers / "thesis.tex").write_text("years of work")
    assert export(run, "--to", str(target), "--dtype", "bfloat16") == 0
    assert export(run, "--to", str(target)) == 1
    assert "--force" in capsys.readouterr().err
    assert export(run, "--to", str(target), "--force") == 0
    assert {tensor.dtype.itemsize for tensor in load_file(target / "model.safetensors").values()} == {4}
    assert export(run, "--to", str(papers), "--force") == 1
    assert "holds no model" in capsys.readouterr().err
    assert (papers / "thesis.tex").exists()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "papers", "runs"], "nothing half-made"


def test_what_was_exported_before_is_named_again(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(run) == 0
    made = run.exports / "step-00000040"
    first = (made / "config.json").stat()
    capsys.readouterr()
    assert export(run) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(made)
    assert "before" in said.err
    assert (made / "config.json").stat().st_ino == first.st_ino
    assert export(run, "--force") == 0
    assert (made / "config.json").stat().st_ino != first.st_ino


def test_a_failure_leaves_nothing(run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(run, f"model.path={tmp_path}") == 1
    assert "model.path=FOLDER" in capsys.readouterr().err
    (run.heldout / "v20.json").write_text("{")
    with pytest.raises(ValueError, match=r"v20\.json"):
        export(run)
    assert list(run.exports.iterdir()) == []


def test_a_run_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path / "nowhere")]) == 1
    assert "cannot read config" in capsys.readouterr().err


def test_the_base_model_is_named_as_on_the_hub() -> None:
    cached = "/somewhere/hub/models--Qwen--Qwen2.5-3B-Instruct/snapshots/aa8e72537993ba99e69dfaafa59ed015b17504d1"
    assert base_model_name(cached) == ("Qwen/Qwen2.5-3B-Instruct", True)
    assert base_model_name("/home/me/models/mine") == ("mine", False)
