"""`deepretrieval sft`, as a user meets it: from rows to a folder that RL can begin from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.data.worlds.sql import build_world
from deploy.cli import main
from deploy.errors import user_message
from tests.tiny_model import build_tiny_model

CONFIG = Path(__file__).parents[2] / "configs" / "demo_sql.yaml"


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Rows of a generated world, and a model."""
    folder = tmp_path_factory.mktemp("sft")
    world = build_world(folder / "world", databases=3, heldout_databases=1, questions=4)
    return world / "rows" / "train.jsonl", build_tiny_model(folder / "model")


def sft(places: tuple[Path, Path], out: Path, *options: str) -> int:
    rows, model = places
    more = ["actor.max_model_len=400", *options]
    return main(["sft", str(CONFIG), "--rows", str(rows), "--out", str(out), f"model.path={model}", *more])


def needs_trl() -> None:
    pytest.importorskip("trl", reason="the extra `sft` is not installed")


def test_the_result_is_a_start_for_rl(
    places: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needs_trl()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from common.config import load_config
    from deploy.assets import local_model
    from learner.loading import read_causal_lm

    out = tmp_path / "start"
    assert sft(places, out, "--epochs", "4", "--lr", "3e-3", "--batch", "4", "sampling.top_p=0.9") == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    losses = json.loads((out / "sft.json").read_text())["losses"]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert local_model(load_config(CONFIG, [f"model.path={out}"])) == out
    start, base = read_causal_lm(out, torch.float32), AutoModelForCausalLM.from_pretrained(places[1])
    assert not torch.equal(start.lm_head.weight, base.lm_head.weight)
    ours, theirs = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(places[1])
    assert (ours.get_vocab(), ours.chat_template) == (theirs.get_vocab(), theirs.chat_template)
    generation = GenerationConfig.from_pretrained(out)
    assert (generation.top_p, generation.max_new_tokens, generation.eos_token_id) == (0.9, 32, ours.eos_token_id)


def test_rows_that_are_too_long_are_counted(
    places: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needs_trl()
    from common.data.demonstrations import read_demonstrations
    from common.tasks import load_task
    from learner.sft import encode

    found = read_demonstrations(places[0], load_task("text_to_sql", prompt="short", reasoning=False))
    lengths = sorted(example.tokens for example in encode(found, places[1], ""))
    most = lengths[len(lengths) // 2]
    over = sum(length > most for length in lengths)
    assert sft(places, tmp_path / "out", "--epochs", "1", "--max-length", str(most)) == 0
    assert f"{over} of {len(lengths)} rows have more than {most} tokens" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "sft.json").read_text())["rows_used"] == len(lengths) - over
    assert sft(places, tmp_path / "none", "--max-length", "5") == 1
    assert "raise --max-length" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_what_is_there_is_not_lost(
    places: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert sft(places, tmp_path, "--force") == 1
    assert "choose another --out" in capsys.readouterr().err
    (tmp_path / "sft.json").write_text("{}")
    assert sft(places, tmp_path) == 1
    assert "--force" in capsys.readouterr().err
    assert (tmp_path / "notes.txt").exists()


def test_a_broken_row_is_one_line(
    places: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "how many?"}\n')
    assert sft((rows, places[1]), tmp_path / "out") == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: rows.jsonl line 1: no text under 'sql', which is where the task text_to_sql answers"
    ]


def test_a_missing_trl_names_the_extra() -> None:
    assert "deepretrieval-async[sft]" in (user_message(ModuleNotFoundError("no", name="trl")) or "")
