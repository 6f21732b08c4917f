"""Evaluations side by side: what a column may hold, what is marked, and what is the best."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from deploy.cli import main
from deploy.evaluation.records import EvaluationFolder, QueryRecord, RecordFile, SampleRecord
from deploy.evaluation.results import Results, differences, results_of_method

QUALITY = ["recall", "mrr"]
SAME = {"task": "t", "data": "d", "engine": "e"}
GREEDY = {"samples": 1, "temperature": 0.0}


def records(values: Sequence[float | None]) -> list[QueryRecord]:
    """A request for each value of recall; None: it could not be scored."""
    return [
        QueryRecord(f"q{number}", "text", apart="unavailable")
        if value is None
        else QueryRecord(f"q{number}", "text", [SampleRecord("scored", metrics={"recall": value, "mrr": value / 2})])
        for number, value in enumerate(values)
    ]


def evaluated(
    path: Path,
    model: str,
    values: Sequence[float | None],
    baselines: dict[str, Sequence[float | None]] | None = None,
    finished: bool = True,
    **identity: Any,
) -> Path:
    """A folder as `eval` leaves it."""
    about = {"task": "publication_search", "dataset": "trials", "split": "test", "engine": "pubmed", "metric": "recall"}
    folder = EvaluationFolder(path)
    with folder.alone():
        folder.claim({"model": model}, {"comparable": SAME, "model": model, "sampling": GREEDY, **about, **identity})
    found = {None: records(values)} | {name: records(each) for name, each in (baselines or {}).items()}
    for name, lines in found.items():
        file = RecordFile(folder.records_of(name))
        for line in lines:
            file.append(line)
        file.close()
    methods = {name or model: results_of_method(lines, QUALITY) for name, lines in found.items()}
    paired = {name: differences(found[None], lines, QUALITY) for name, lines in found.items() if name}
    about = {name: about[name] for name in ("task", "engine", "split", "metric")}
    results = Results(
        model=model, quality=QUALITY, samples=1, temperature=0.0, methods=methods, differences=paired, **about
    )
    if finished:
        folder.results.write_bytes(msgspec.json.encode(results))
    return path


def compared(capsys: pytest.CaptureFixture[str], *words: Path | str) -> list[str]:
    assert main(["compare", *map(str, words)]) == 0
    return capsys.readouterr().out.splitlines()


def row(lines: Sequence[str], label: str, table: int = 0) -> list[str]:
    """The cells of a row in the first table or in that of the differences."""
    found = [line for line in lines if line.startswith(f"| {label} |")]
    return [cell.strip() for cell in found[table].strip("|").split("|")[1:]]


def test_datasets_are_columns_and_named_models_share_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pubs = evaluated(tmp_path / "a", "pubs@50", [1.0, 0.5, 1.0], {"original": [0.5, 0.5, 0.0], "rarest_2": [0.0] * 3})
    trials = evaluated(tmp_path / "b", "trials@9", [0.2, 0.2], dataset="ctgov", comparable={**SAME, "data": "other"})
    rival = evaluated(tmp_path / "c", "rival", [1.0, 1.0, 1.0], {"original": [0.5, 0.5, None]})
    lines = compared(capsys, f"ours={pubs}", f"ours={trials}", rival)
    head = next(line for line in lines if line.startswith("| method"))
    assert head == "| method | trials test pubmed: recall | ctgov test pubmed: recall |"
    order = [line.split("|")[1].strip() for line in lines if line.startswith("| ")][1:6]
    assert order == ["---", "raw request", "AND of the k rarest words", "ours", "rival"]
    assert row(lines, "rival") == ["**1.000** [1.000, 1.000]", "–"]
    assert row(lines, "ours")[0].startswith("0.833 [")
    assert row(lines, "ours")[1] == "**0.200** [0.200, 0.200]"
    assert row(lines, "raw request")[0].startswith("0.333 ["), "the complete one of the two, not the one with an outage"
    assert row(lines, "rival", 1) == ["+0.167 [+0.000, +0.500]", "–"]
    assert row(lines, "raw request", 1)[0].startswith("-0.500")
    assert sum(line.startswith("| ours |") for line in lines) == 1, "it is not compared with itself"


def test_what_is_missing_is_marked_and_never_the_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = evaluated(tmp_path / "whole", "whole", [0.5, 0.5, 0.5, 0.0])
    outage = evaluated(tmp_path / "outage", "outage", [1.0, 1.0, None, None])
    short = evaluated(tmp_path / "short", "short", [1.0])
    begun = evaluated(tmp_path / "begun", "begun", [1.0, 1.0], finished=False)
    grown = evaluated(tmp_path / "grown", "grown", [1.0, 1.0, 1.0])
    more = RecordFile(grown / "queries.jsonl")
    more.append(QueryRecord("q3", "text", [SampleRecord("scored", metrics={"recall": 1.0})]))
    more.close()
    lines = compared(capsys, whole, outage, short, begun, grown)
    assert row(lines, "whole")[0].startswith("**0.375**")
    assert row(lines, "outage") == ["1.000 [1.000, 1.000] †"]
    assert row(lines, "short") == ["1.000 [1.000, 1.000] †"]
    assert row(lines, "begun") == row(lines, "grown") == ["unfinished"]
    assert row(lines, "outage", 1) == ["+0.500* [+0.500, +0.500] †"], "over the two that both have"
    assert row(lines, "begun", 1) == ["–"]
    notes = [line for line in lines if line.startswith("* ")]
    assert notes[0] == "* outage, trials test pubmed: † 2 of 4 requests; in no figure: 2 unavailable."
    assert notes[1] == "* short, trials test pubmed: † 1 of 4 requests."
    assert "unfinished, 2 requests so far: run its eval command again" in notes[2]


def test_samples_metrics_and_the_reference_can_be_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = {"sampling": {"samples": 8, "temperature": 0.7}}
    one = evaluated(tmp_path / "one", "a|b", [1.0, 0.0], {"rm3": [0.5, 0.5]})
    several = evaluated(tmp_path / "several", "a|b", [1.0, 1.0], **drawn)
    out, plot = tmp_path / "table.md", tmp_path / "bars.png"
    options = ("--metric", "mrr", "--metric", "recall", "--against", "rm3", "--out", out, "--plot", plot)
    lines = compared(capsys, one, several, *options)
    assert "| method | trials test pubmed: mrr | trials test pubmed: recall |" in lines
    assert any(line.startswith("| a\\|b (8 at T 0.7) | **0.500** [0.500, 0.500] |") for line in lines)
    assert any(line.startswith("Each minus RM3 of the request") for line in lines)
    assert out.read_text().splitlines() == lines
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"comparable": {**SAME, "engine": "x"}}, "but with another engine: they cannot share a column"),
        ({"comparable": {**SAME, "task": "x", "data": "x"}}, "but with another task and data"),
        ({"comparable": {}}, "written by an earlier version: run its eval command again"),
        ({"model": "one"}, "are both one on trials test pubmed: name their rows"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    one = evaluated(tmp_path / "one", "one", [1.0])
    other = evaluated(tmp_path / "other", changes.pop("model", "two"), [1.0], **changes)
    assert_refused(capsys, message, one, other)


def test_wrong_words_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = evaluated(tmp_path / "one", "one", [1.0])
    assert_refused(capsys, "holds no evaluation: name a folder that", tmp_path / "none")
    assert_refused(capsys, "write a name before the =", f"={one}")
    assert_refused(capsys, "nothing measured f1 on trials test pubmed; measured: recall, mrr", one, "--metric", "f1")
    assert_refused(capsys, "there is no such row; there are one", one, "--against", "two")
    assert_refused(capsys, "name a file that ends in .png", one, "--plot", "bars.gif")
    (one / "results.json").write_text("{")
    assert_refused(capsys, "results.json", one)


def assert_refused(capsys: pytest.CaptureFixture[str], message: str, *words: Path | str) -> None:
    assert main(["compare", *map(str, words)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
