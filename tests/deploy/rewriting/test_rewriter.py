"""`from deepretrieval import Rewriter` and `deepretrieval rewrite`, with a real model and a real search server."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepretrieval import NotPossible, Rewriter
from deploy.cli import main
from deploy.errors import LaunchError

SETTINGS = ("task.prompt=short", "actor.engine=transformers", "sampling.max_tokens=24", "actor.max_model_len=256")
REQUESTS = ["Does aspirin help?", "Sleep in older adults?", "Metformin or placebo?"]


@pytest.fixture(scope="module")
def rewriter(corpus: Path, model: Path) -> Iterator[Rewriter]:
    with Rewriter(model, overrides=[*SETTINGS, f"data.corpus={corpus}"]) as started:
        yield started


def test_a_random_model_writes_queries_all_the_same(rewriter: Rewriter) -> None:
    rewrites = rewriter.rewrite_all(REQUESTS, top=2)
    assert [each.request for each in rewrites] == REQUESTS
    for rewrite in rewrites:
        assert rewrite.query
        assert not rewrite.invalid
        assert rewrite.task == "publication_search"
        assert rewrite.found is not None
        assert rewrite.found.query == rewrite.query
    assert rewriter.rewrite_all(REQUESTS, top=2) == rewrites, "greedy"


def test_searching_shows_titles(rewriter: Rewriter) -> None:
    found = rewriter.search("aspirin", top=1)
    assert (found.count, [(hit.id, hit.title, hit.url) for hit in found.hits]) == (2, [("d4", "", "")])
    assert [hit.title for hit in rewriter.search("sleep").hits] == ["Exercise and sleep"]
    assert "unbalanced" in rewriter.search("(aspirin").refused
    assert rewriter.search("aspirin").translation


def test_sampled_rewrites_repeat_with_their_seed(rewriter: Rewriter) -> None:
    first, again, other = (rewriter.rewrite(REQUESTS[0], temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.query != other.query


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"request": " "}, "empty"),
        ({"request": "a", "task": "publication_serch"}, "there is no task"),
        ({"request": "a", "task": "os:system"}, "there is no task"),
        ({"request": "a", "task": "trial_search", "top": 1}, "no engine is started for the task trial_search"),
        ({"request": "a", "task": "text_to_sql", "database": "shop"}, "needs the name of a database"),
    ],
)
def test_what_makes_no_sense_is_said(rewriter: Rewriter, asked: dict[str, object], message: str) -> None:
    with pytest.raises(NotPossible, match=message):
        rewriter.rewrite(**asked)  # type: ignore[arg-type]


def test_other_tasks_are_rewritten_for_without_an_engine(rewriter: Rewriter) -> None:
    assert rewriter.rewrite("stroke", task="trial_search").query


def test_it_ends_once(model: Path) -> None:
    rewriter = Rewriter(model, overrides=SETTINGS, search=False)
    rewriter.close()
    rewriter.close()
    with pytest.raises(RuntimeError, match="closed"):
        rewriter.rewrite("a")


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="is no model"):
        Rewriter(tmp_path)


def command(model: Path, *words: str) -> list[str]:
    return ["rewrite", *words, "--model", str(model), "--set", *SETTINGS]


def test_the_query_stands_alone_on_the_first_line(
    corpus: Path, model: Path, capsys: pytest.CaptureFixture[str], rewriter: Rewriter
) -> None:
    assert main(command(model, REQUESTS[0], "--search", "--corpus", str(corpus), "--task", "publication_search")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == rewriter.rewrite(REQUESTS[0]).query
    assert any("result" in line or "refused" in line for line in lines[1:])


def test_a_file_in_batch(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rewriter: Rewriter) -> None:
    file, out = tmp_path / "requests.jsonl", tmp_path / "rewrites.jsonl"
    file.write_text(json.dumps({"request": REQUESTS[1]}) + "\n\n" + REQUESTS[2] + "\n")
    monkeypatch.setattr("sys.stdin", io.StringIO(REQUESTS[0] + "\n"))
    assert main(command(model, "-", "--file", str(file), "--out", str(out))) == 0
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(each["request"], each["query"]) for each in written] == [
        (each.request, each.query) for each in rewriter.rewrite_all(REQUESTS)
    ]


def test_one_request_that_is_too_long_does_not_end_the_others(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "requests.txt"
    file.write_text(f"{'long ' * 300}\nshort\n")
    assert main(command(model, "--file", str(file), "--json")) == 1
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert "actor.max_model_len" in first["invalid"]
    assert second["query"]


@pytest.mark.parametrize(
    ("line", "message"), [('{"query": "a"}', "key request"), ('{"request": 1}', "are strings"), ("{broken", "line 1")]
)
def test_a_broken_line_is_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text(line + "\n")
    assert main(command(model, "--file", str(file))) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
