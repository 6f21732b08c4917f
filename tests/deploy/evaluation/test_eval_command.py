"""`deepretrieval eval` as a user meets it: with a real model, a real search server, and interruptions."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from deploy.cli import main
from tests.deploy.evaluation.held_endpoint import HeldEndpoint
from tests.tiny_model import build_tiny_model

WORDS = ("aspirin", "stroke", "sleep", "exercise", "metformin", "diabetes", "trial", "placebo", "children", "insomnia")
REQUESTS, HALF = 24, 10
ENGINE = ("--task", "publication_search", "--engine", "pubmed")
MODEL = ("task.prompt=short", "actor.engine=transformers", "sampling.max_tokens=24", "actor.max_model_len=128")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BEIR folder: document i holds the words i, i+1 and i+2; request i asks for the first two, by PICO elements."""
    folder = tmp_path_factory.mktemp("corpus")
    words = [WORDS[i % len(WORDS)] for i in range(REQUESTS + 2)]
    documents = [{"_id": f"d{i}", "title": words[i], "text": f"{words[i + 1]} {words[i + 2]}"} for i in range(REQUESTS)]
    queries = [{"_id": f"q{i}", "text": f"P: {words[i]}\nI: {words[i + 1]}\n"} for i in range(REQUESTS)]
    for name, lines in (("corpus", documents), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "qrels").mkdir()
    judged = "".join(f"q{i}\td{i}\t1\n" for i in range(REQUESTS))
    (folder / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def arguments(corpus: Path, model: Path | str, out: Path, *options: str) -> list[str]:
    fixed = [*ENGINE, "--corpus", str(corpus), "--split", "dev", "--model", str(model), "--out", str(out)]
    return ["eval", *fixed, *MODEL, *options]


def results(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    return found


def lines(out: Path, name: str = "queries.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def test_plain_requests_beside_the_baselines(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, run_file = tmp_path / "out", tmp_path / "plain.run"
    options = ("--baselines", "--run-file", str(run_file), "--limit", "9")
    assert main(arguments(corpus, "none", out, *options)) == 0
    found = results(out)
    assert found["metric"] == found["quality"][0] == "recall"
    assert {"and_all", "or_all", "pico_or", "rarest_1"} < set(found["methods"])
    assert "original" not in found["methods"], "that is what is evaluated"
    assert "rm3" not in found["methods"], "feedback is of BM25"
    assert {method["queries"] for method in found["methods"].values()} == {9}
    recall = {name: method["metrics"]["recall"]["mean"] for name, method in found["methods"].items()}
    assert recall["pico_or"] == recall["or_all"] == 1.0
    assert found["differences"]["pico_or"]["recall"]["mean"] == pytest.approx(recall["raw request"] - 1.0)
    assert found["methods"]["or_all"]["calls"] == len(
        {line["samples"][0]["query"] for line in lines(out, "baselines/or_all.jsonl")}
    )
    assert {line.split()[0] for line in run_file.read_text().splitlines()} <= {f"q{i}" for i in range(9)}
    assert "| **raw request** |" in capsys.readouterr().out
    assert main(arguments(corpus, "none", out, *options)) == 0, "all is done already"
    assert results(out) == found


def test_killed_and_torn_it_goes_on_and_ends_the_same(corpus: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    with HeldEndpoint(REQUESTS) as endpoint:
        assert main(asking(endpoint, corpus, whole)) == 0
    with HeldEndpoint(HALF) as endpoint:
        process = start(asking(endpoint, corpus, out), out)
        process.kill()
        process.communicate()
        written = (out / "queries.jsonl").read_bytes()
        (out / "queries.jsonl").write_bytes(written + b'{"id":"q')
        endpoint.release()
        assert main(asking(endpoint, corpus, out)) == 0
    assert (out / "queries.jsonl").read_bytes().startswith(written), "what was finished is not done again"
    assert len(lines(out)) == REQUESTS
    first, second = (results(folder)["methods"]["m"] for folder in (whole, out))
    assert first["metrics"]["recall"]["mean"] > 0
    assert first["metrics"] == second["metrics"]


def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(corpus: Path, tmp_path: Path) -> None:
    with HeldEndpoint(HALF) as endpoint:
        process = start(asking(endpoint, corpus, tmp_path / "out"), tmp_path / "out")
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "the same command goes on" in output
    assert "Traceback" not in output
    assert len(lines(tmp_path / "out")) == HALF


def test_an_outage_is_reported_apart_and_tried_again(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main(arguments(corpus, "none", whole)) == 0
    assert main(arguments(corpus, "none", out, "search.fault_rate=0.4", "search.attempts=1")) == 1
    shaky = results(out)["methods"]["raw request"]
    assert 0 < shaky["apart"]["unavailable"] < REQUESTS
    assert shaky["queries"] == REQUESTS - shaky["apart"]["unavailable"]
    assert "could not be scored" in capsys.readouterr().out
    assert main(arguments(corpus, "none", out)) == 0
    assert results(out)["methods"]["raw request"]["metrics"] == results(whole)["methods"]["raw request"]["metrics"]


def test_a_recording_is_replayed_without_an_engine(corpus: Path, tmp_path: Path) -> None:
    recording = tmp_path / "recording"
    recorded = ("search.cache.mode=record", f"search.cache.folder={recording}")
    assert main(arguments(corpus, "none", tmp_path / "live", *recorded)) == 0
    assert main(arguments(corpus, "none", tmp_path / "again", "--replay", str(recording), "search.port=1")) == 0
    live, again = (results(tmp_path / name)["methods"]["raw request"] for name in ("live", "again"))
    assert live["metrics"] == again["metrics"]
    assert (live["calls"], again["calls"]) == (
        len({line["samples"][0]["query"] for line in lines(tmp_path / "live")}),
        0,
    )
    assert main(arguments(corpus, "none", tmp_path / "baselines", "--replay", str(recording), "--baselines")) == 78


def test_prompts_that_do_not_fit_are_counted_and_nothing_crashes(
    corpus: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(corpus, model, tmp_path / "out", "actor.max_model_len=42")) == 0
    found = results(tmp_path / "out")["methods"]["tiny"]
    assert found["queries"] > 0
    assert found["apart"] == {"too_long": REQUESTS - found["queries"]}
    assert "raise actor.max_model_len" in capsys.readouterr().out
    assert main(arguments(corpus, model, tmp_path / "none", "actor.max_model_len=30")) == 1, "there is no figure"


def test_samples_give_a_mean_and_a_best(corpus: Path, model: Path, tmp_path: Path) -> None:
    options = ("--samples", "3", "--temperature", "0.7", "--limit", "4")
    assert main(arguments(corpus, model, tmp_path / "out", *options)) == 0
    found = results(tmp_path / "out")["methods"]["tiny"]
    assert found["samples"] == 12
    assert found["best"]["recall"]["mean"] >= found["metrics"]["recall"]["mean"]
    assert len({sample["text"] for sample in lines(tmp_path / "out")[0]["samples"]}) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--samples", "4", "--temperature", "0"), "greedy answers are all the same"),
        (("--limit", "0"), "--limit must be at least 1"),
        (("--split", "nowhere"), "splits there: dev"),
        (("--engine", "dense"), "set that"),
        (("--model", "./nowhere"), "is no model"),
        (("--prompt", "original"), "has no published prompt"),
        (("--base-url", "http://127.0.0.1:1"), "--base-url is for an endpoint"),
        (("some.yaml", "other.yaml"), "name one config or run"),
        (("task.naem=x",), "did you mean"),
    ],
)
def test_what_makes_no_sense_is_one_line(
    corpus: Path,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    message: str,
) -> None:
    assert main(arguments(corpus, model, tmp_path / "out", *options)) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_another_model_does_not_go_on_in_the_same_folder(
    corpus: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(corpus, "none", tmp_path / "out", "--limit", "2")) == 0
    assert main(arguments(corpus, model, tmp_path / "out", "--limit", "2")) == 1
    assert "holds an evaluation with another model" in capsys.readouterr().err


def asking(endpoint: HeldEndpoint, corpus: Path, out: Path) -> list[str]:
    return arguments(corpus, "openai:m", out, "--base-url", endpoint.url, "task.reasoning=false")


def _heed_ctrl_c() -> None:
    """Tests that run in the background have SIGINT ignored, and a child would inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(words: list[str], out: Path) -> subprocess.Popen[str]:
    """The command in a process of its own, met when all that it gets answers to is on disk."""
    command = [sys.executable, "-m", "deploy.cli", *words]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=_heed_ctrl_c,
    )
    deadline = time.monotonic() + 120
    written = out / "queries.jsonl"
    while not written.exists() or written.read_bytes().count(b"\n") < HALF:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process
