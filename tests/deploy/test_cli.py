"""The command line as a user meets it: real processes, one clear line for every mistake, no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.cli import _parse
from deploy.errors import exit_status, load_user_errors, user_message
from deploy.restarts import HOPELESS
from rewarders.errors import ScoringError
from tests.deploy.small_disk import fill, needs_mount, small_disk
from tests.tiny_model import build_tiny_model

ROOT = Path(__file__).parents[2]


def deepretrieval(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deploy.cli", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def write_corpus(folder: Path) -> Path:
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text('{"_id": "1", "title": "heart", "text": "heart failure"}\n')
    (folder / "queries.jsonl").write_text('{"_id": "q", "text": "heart"}\n')
    for split in ("train", "test"):
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\nq\t1\t1\n")
    return folder


@pytest.fixture
def config(tmp_path: Path) -> Path:
    corpus = write_corpus(tmp_path / "corpus")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    path = tmp_path / "run.yaml"
    path.write_text(
        f"data: {{corpus: {corpus}}}\nmodel: {{path: {tmp_path / 'model'}}}\nactor: {{engine: transformers}}\n"
    )
    return path


def fails_with(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 1
    assert "Traceback" not in result.stderr + result.stdout
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    for word in words:
        assert word in errors[0]


def test_a_dry_run_prints_the_resolved_config(config: Path, tmp_path: Path) -> None:
    result = deepretrieval("train", str(config), "learner.steps=3", "--dry-run", cwd=tmp_path)
    assert result.returncode == 0
    assert "steps: 3" in result.stdout
    assert "name: run" in result.stdout


def test_a_dry_run_says_what_the_learner_will_need(config: Path, tmp_path: Path) -> None:
    model = build_tiny_model(tmp_path / "tiny")
    result = deepretrieval("train", str(config), f"model.path={model}", "--dry-run", cwd=tmp_path)
    assert result.returncode == 0
    assert "# memory: 1.14 GiB per learner rank (activations 0.14" in result.stdout
    unbuilt = deepretrieval("train", str(config), "model.path=null", "--dry-run", cwd=tmp_path)
    assert "# memory: known once the model is here (built on first use)" in unbuilt.stdout


def test_a_wrong_key_names_the_right_one(config: Path, tmp_path: Path) -> None:
    fails_with(deepretrieval("train", str(config), "learner.step=3", cwd=tmp_path), "learner.step", "learner.steps")


def test_a_dead_search_server_is_named_before_anything_starts(config: Path, tmp_path: Path) -> None:
    result = deepretrieval("train", str(config), "search.url=http://127.0.0.1:9", cwd=tmp_path)
    fails_with(result, "127.0.0.1:9")


def test_a_broken_corpus_line_is_named(config: Path, tmp_path: Path) -> None:
    with (tmp_path / "corpus" / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "2", "title": \n')
    fails_with(deepretrieval("train", str(config), cwd=tmp_path), "corpus.jsonl line 2")


def test_a_missing_corpus_and_an_unset_variable_are_named(config: Path, tmp_path: Path) -> None:
    fails_with(deepretrieval("train", str(config), "data.corpus=nowhere", cwd=tmp_path), "nowhere", "BEIR folder")
    result = deepretrieval("train", str(config), "data.corpus=$UNSET_FOLDER/x", cwd=tmp_path)
    fails_with(result, "UNSET_FOLDER", "export it")


def test_a_model_folder_without_a_model_is_named(config: Path, tmp_path: Path) -> None:
    (tmp_path / "model" / "config.json").unlink()
    fails_with(deepretrieval("train", str(config), cwd=tmp_path), "config.json is missing")


def test_nothing_to_resume_is_said(config: Path, tmp_path: Path) -> None:
    result = deepretrieval("train", str(config), "--resume", cwd=tmp_path)
    fails_with(result, "nothing to resume", "start without --resume")
    assert not (tmp_path / "runs").exists(), "nothing was begun"


@needs_mount
def test_a_full_disk_is_one_line(config: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        fill(disk)
        result = deepretrieval("train", str(config), f"run.root={disk}", cwd=tmp_path)
        fails_with(result, "no space left", "free some")


def test_overrides_may_stand_after_options() -> None:
    arguments = _parse(["train", "c.yaml", "a.b=1", "--resume", "c.d=2"])
    assert arguments.overrides == ["a.b=1", "c.d=2"]
    with pytest.raises(SystemExit):
        _parse(["train", "c.yaml", "--surprise"])
    with pytest.raises(SystemExit):
        _parse(["doctor", "x=1"])


def test_the_learner_may_have_to_resume_or_only_if_it_can() -> None:
    base = ["learner", "c.yaml", "--connect", "tcp://h:1"]
    assert _parse(base).resume == "no"
    assert _parse([*base, "--resume"]).resume == "must"
    assert _parse([*base, "--resume", "auto"]).resume == "auto"
    assert _parse([*base, "--resume=auto", "a.b=1"]).overrides == ["a.b=1"]
    arguments = _parse(["learner", "--resume", "c.yaml", "--connect", "tcp://h:1", "--resume", "a.b=1"])
    assert (arguments.config, arguments.resume, arguments.overrides) == ("c.yaml", "must", ["a.b=1"])
    with pytest.raises(SystemExit):
        _parse([*base, "--resume=perhaps"])


def test_ranks_that_do_not_make_equal_replicas_are_refused(config: Path, tmp_path: Path) -> None:
    command = ["learner", str(config), "learner.replicas=2", "--connect", "tcp://127.0.0.1:9", "--processes", "3"]
    fails_with(deepretrieval(*command, cwd=tmp_path), "processes: 3", "multiple of replicas")


def test_roles_are_launched_on_ray_and_nowhere_else_yet(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = _parse(["launch", "c.yaml", "--on", "ray", "--address", "ray://h:10001", "a.b=1"])
    assert (arguments.on, arguments.address, arguments.overrides) == ("ray", "ray://h:10001", ["a.b=1"])
    with pytest.raises(SystemExit):
        _parse(["launch", "c.yaml", "--on", "slurm"])
    assert "'ray'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        _parse(["launch", "c.yaml"])


def test_the_search_server_can_be_told_to_fail() -> None:
    words = ["search-server", "pubmed", "--corpus", "c", "--fault-rate", "0.1", "--fault-seed", "3"]
    arguments = _parse(words)
    assert (arguments.fault_rate, arguments.fault_seed) == (0.1, 3)


def test_every_user_error_exists_and_is_shown_as_one_line() -> None:
    for error_class in load_user_errors():
        assert issubclass(error_class, Exception)
    assert user_message(OSError(28, "No space left on device", "/x")) is not None
    assert "pip install" in (user_message(ModuleNotFoundError("no", name="torch")) or "")
    assert user_message(RuntimeError("a bug")) is None
    assert (exit_status(OSError()), exit_status(ScoringError("a metric fails"))) == (1, HOPELESS)
