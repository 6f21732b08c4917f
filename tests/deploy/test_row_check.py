"""Rows that can never be scored are found before a run, named, and left out."""

from __future__ import annotations

import io
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from rich.console import Console

from common.config import Config, to_yaml
from common.data.rows import requests_of
from common.data.worlds.folders import write_rows
from common.tasks import Row
from deploy.cli import main
from deploy.errors import LaunchError
from deploy.row_check import unusable_rows, without_unusable_rows
from deploy.run_setup import run_folder

GOOD = Row("good", "How many?", database="shop", gold_sql="SELECT count(*) FROM item")
REFUSED = Row("refused", "?", database="shop", gold_sql="SELECT nothing FROM nowhere")
NO_DATABASE = Row("lost", "?", database="gone", gold_sql="SELECT 1")
NO_GOLD = Row("bare", "?", database="shop")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setenv("DEEPRETRIEVAL_CACHE", str(tmp_path / "cache"))
    corpus = tmp_path / "data"
    (corpus / "databases").mkdir(parents=True)
    with closing(sqlite3.connect(corpus / "databases" / "shop.sqlite")) as connection:
        connection.execute("CREATE TABLE item (name)")
        connection.commit()
    write_rows(corpus, "train", [GOOD, REFUSED, NO_DATABASE, NO_GOLD])
    write_rows(corpus, "test", [Row("held", "How many?", database="shop", gold_sql="SELECT count(*) FROM item")])
    sections = {
        "run": {"name": "check", "root": str(tmp_path / "runs")},
        "task": {"name": "text_to_sql"},
        "data": {"corpus": str(corpus)},
        "search": {"engine": "sqlite", "sql": {"processes": 1, "deadline_s": 10}},
    }
    return Config.model_validate(sections)


def test_unusable_rows_are_named_with_their_reason(config: Config) -> None:
    found = unusable_rows(config)
    assert sorted(found) == ["bare", "lost", "refused"]
    assert "no gold_sql" in found["bare"]
    assert "no database 'gone'" in found["lost"]
    assert "refused" in found["refused"]


def test_the_run_leaves_them_out_and_says_so(config: Config) -> None:
    said = io.StringIO()
    left = without_unusable_rows(config, resume=False, console=Console(file=said, width=200))
    assert [row.id for row in requests_of(left.data, "train")] == ["good"]
    assert "3 rows can never be scored" in said.getvalue()
    assert "lost: " in said.getvalue()


def test_a_run_that_goes_on_keeps_the_rows_it_began_with(config: Config) -> None:
    """Were the rows judged anew, its positions could mean other prompts."""
    folder = run_folder(config)
    folder.path.mkdir(parents=True)
    data = config.data.model_copy(update={"exclude": ("lost",)})
    folder.config.write_text(to_yaml(config.model_copy(update={"data": data})))
    left = without_unusable_rows(config, resume=True, console=Console(file=io.StringIO()))
    assert left.data.exclude == ("lost",)


def test_without_a_row_that_can_be_scored_there_is_no_run(config: Config) -> None:
    write_rows(Path(config.data.corpus), "test", [REFUSED])
    with pytest.raises(LaunchError, match="no row of the split test can be scored"):
        without_unusable_rows(config, resume=False, console=Console(file=io.StringIO()))


def test_reference_queries_run_once_for_the_same_data(config: Config, tmp_path: Path) -> None:
    write_rows(Path(config.data.corpus), "train", [GOOD, REFUSED])
    first = unusable_rows(config)
    (kept,) = (tmp_path / "cache" / "checks").iterdir()
    assert unusable_rows(config) == first
    kept.write_text('{"good": "as it was kept"}')
    assert unusable_rows(config) == {"good": "as it was kept"}
    database = Path(config.data.corpus) / "databases" / "shop.sqlite"
    database.touch()
    assert unusable_rows(config) == first


def test_the_command_lists_them(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "check.yaml"
    path.write_text(to_yaml(config))
    assert main(["data", "check", str(path)]) == 1
    assert "refused: " in capsys.readouterr().out
    write_rows(Path(config.data.corpus), "train", [GOOD])
    assert main(["data", "check", str(path)]) == 0
