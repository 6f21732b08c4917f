"""Every data set of the original, from its published files to the figures of `deepretrieval eval`, a small engine."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from common.data.catalogue import DATASETS, Dataset
from common.data.prepare import prepare
from common.data.rows import read_requests
from common.tasks import Row, load_task
from deploy.cli import main
from rewarders.servers.retrieval.app import serve
from rewarders.servers.traffic import ServerSettings
from tests.common.data import raw_worlds
from tests.deploy.evaluation.held_endpoint import HeldEndpoint
from tests.rewarders.retrieval.worlds import WordIndex, loop_in_a_thread, write_corpus

# What raw_worlds asks for, wherever it stands in a prompt.
REQUEST = re.compile(r"request (\d+) of (\w+)")
SETS = sorted(name for name, each in DATASETS.items() if each.layout in (*raw_worlds.WRITERS, "merged"))
# The requests that the model gets wrong.
WRONG = "2"


def prepared(name: str, folder: Path) -> Path:
    """The data set's folder, made from raw files in the format of its source."""
    dataset = DATASETS[name]
    for part in dataset.parts:
        prepared(part, folder)
    if not dataset.parts:
        raw_worlds.WRITERS[dataset.layout](dataset, folder / "raw" / name)
    prepare(dataset, folder / "raw" / ("" if dataset.parts else name), folder / name)
    return folder / name


def answer_for(dataset: Dataset, request: str) -> str:
    """What a perfect model would say, but for some requests."""
    number, split = REQUEST.findall(request)[-1]
    words = ["request", number, "of", split]
    if dataset.task == "text_to_sql":
        query = raw_worlds.GOLD.format(age=number)
    elif dataset.layout == "reviews":
        query = " AND ".join(word for word in words if word != "of")
    else:
        query = " ".join(words)
    if number == WRONG:
        query = "SELECT 'nobody'" if dataset.task == "text_to_sql" else "unheard-of"
    return load_task(dataset.task).answer_text(query, "so")


def documents_for(rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """Every relevant document, and for questions a passage, says what its row asks; nothing else does."""
    found = {"other": ("", "nothing of it")}
    for row in rows:
        texts = dict.fromkeys(row.relevant, row.text)
        if row.answers:
            texts[f"passage-{row.id}"] = f"{row.text} {row.answers[0]}"
        found |= {name: ("", text) for name, text in texts.items()}
    return found


@contextlib.contextmanager
def engine(dataset: Dataset, folder: Path, rows: Sequence[Row]) -> Iterator[list[str]]:
    """The words that choose a small engine: the servers of PubMed and trials over the documents, the server of rankings
    over an index of words, or SQLite."""
    kind = dataset.engines[0]
    if kind == "sqlite":
        yield ["--engine", kind]
        return
    (folder / "corpus.jsonl").unlink(missing_ok=True)
    documents = documents_for(rows)
    write_corpus(folder, documents)
    if dataset.layout == "reviews":
        yield ["--engine", kind]
        return
    settings = ServerSettings(corpus=folder, cache_folder=folder / "cache")
    with loop_in_a_thread() as run:
        server = run(serve(settings, WordIndex(documents)))
        try:
            yield ["--engine", kind, f"search.url={server.base_url}"]
        finally:
            run(server.close())


def results(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    return found


@pytest.mark.parametrize("name", SETS)
def test_from_published_files_to_figures(name: str, tmp_path: Path) -> None:
    dataset = DATASETS[name]
    folder = prepared(name, tmp_path)
    rows = read_requests(folder, "test")
    wrong = sum(REQUEST.findall(row.text)[-1][0] == WRONG for row in rows)
    assert 0 < wrong < len(rows)
    out = tmp_path / "out"
    variant = [f"task.options.dataset={dataset.variant}"] if dataset.variant else []
    with (
        HeldEndpoint(1000, lambda request: answer_for(dataset, request)) as endpoint,
        engine(dataset, folder, rows) as words,
    ):
        model = ["--model", "openai:m", "--base-url", endpoint.url, "--out", str(out)]
        data = ["--task", dataset.task, "--corpus", str(folder), "--split", "test"]
        assert main(["eval", *model, *data, *words, *variant]) == 0
    found = results(out)
    figures = found["methods"]["m"]
    assert figures["queries"] == len(rows)
    assert figures["metrics"]["format"]["mean"] == 1.0
    assert figures["metrics"][found["metric"]]["mean"] == pytest.approx(1 - wrong / len(rows))
    assert "| **m** |" in (out / "table.md").read_text()
