"""What only the parts of a configuration together can judge: one line before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.config import Config, load_config
from deploy.errors import LaunchError
from deploy.run_checks import check_rows, check_values

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def config(**sections: object) -> Config:
    return Config.model_validate(sections)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_could_be_launched(path: Path) -> None:
    check_values(load_config(path))


@pytest.mark.parametrize(
    ("task", "search", "message"),
    [
        ({"name": "text_to_sql"}, {"engine": "pubmed"}, "text_to_sql is for search.engine=sqlite"),
        ({"name": "evidence_seeking"}, {"engine": "dense"}, "evidence_seeking is for search.engine=bm25"),
        (
            {"name": "evidence_seeking", "options": {"retriever": "dense"}},
            {"engine": "bm25"},
            "evidence_seeking is for search.engine=dense",
        ),
        ({"name": "publication_search"}, {"engine": "ctgov"}, "publication_search is for search.engine=pubmed"),
        ({}, {"sort": "unsorted"}, "unsorted, which pubmed does not have"),
        ({}, {"retmax": 10_000}, "search.retmax is 10000, but PubMed gives 9,999 ids"),
        (
            {"name": "ranking", "options": {"retriever": "bm25_boolean"}},
            {"engine": "bm25"},
            "set search.bm25.syntax=boolean",
        ),
        (
            {"name": "text_to_sql"},
            {"engine": "sqlite", "cache": {"mode": "record"}},
            "search.cache.mode is record, but SQL answers run on files at rest",
        ),
        ({"name": "text_to_sql"}, {"engine": "sqlite", "cache": {"mode": "replay"}}, "mode is replay, but SQL"),
        ({"name": "text_to_sql"}, {"engine": "sqlite", "max_connections": 4}, "set search.sql.processes"),
        ({"metrics": ["no_such_file:metric"]}, {}, "there is no module 'no_such_file'"),
        ({"reward": {"metric": "common.metrics.ranking:no_such_metric"}}, {}, "has no 'no_such_metric'"),
        ({"name": "common.tasks.row:Row"}, {}, "no subclass of common.tasks.Task"),
        ({"name": "trial_serch"}, {"engine": "ctgov"}, "did you mean 'trial_search'"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    task: dict[str, object], search: dict[str, object], message: str
) -> None:
    with pytest.raises(LaunchError, match=message) as raised:
        check_values(config(task=task, search=search))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("task", "search"),
    [
        ({}, {"retmax": 9_999}),
        ({"name": "trial_search"}, {"engine": "ctgov", "sort": "unsorted", "retmax": 20_000}),
        ({"name": "ranking", "options": {"retriever": "dense"}}, {"engine": "dense"}),
        (
            {"name": "ranking", "options": {"retriever": "bm25_boolean"}},
            {"engine": "bm25", "bm25": {"syntax": "boolean"}},
        ),
        ({"name": "text_to_sql"}, {"engine": "sqlite"}),
        ({"name": "text_to_sql"}, {"engine": "sqlite", "cache": {"mode": "disk"}}),
    ],
)
def test_what_fits_passes(task: dict[str, object], search: dict[str, object]) -> None:
    check_values(config(task=task, search=search))


def test_data_of_another_task_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    for split in ("train", "test"):
        (tmp_path / "rows" / f"{split}.jsonl").write_text(json.dumps({"id": "q1", "text": "who", "answers": ["me"]}))
    data = {"corpus": str(tmp_path)}
    check_rows(config(task={"name": "evidence_seeking"}, search={"engine": "bm25"}, data=data))
    with pytest.raises(LaunchError, match=r"\(train\): row 'q1' has no relevant, which the task publication_search"):
        check_rows(config(data=data))
