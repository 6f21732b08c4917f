"""What is asked, what is measured, and what makes two evaluations different."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from common.config import load_config
from common.tasks.from_config import task_of
from deploy.cli import build_parser
from deploy.errors import LaunchError
from deploy.evaluation.command import plan_of
from deploy.evaluation.plan import Plan, quality_metrics, with_standard_metrics

PUBLISHED = {
    "template": "text",
    "messages": [{"role": "system", "content": "As"}, {"role": "user", "content": "published"}],
    "prefix": "Let me.\n<think>",
}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Three requests, of which one has nothing relevant and one has no published prompt."""
    rows = [
        {"id": "1", "text": "aspirin", "relevant": ["d1"], "metadata": {"original_prompt": PUBLISHED}},
        {"id": "2", "text": "nothing to find"},
        {"id": "3", "text": "sleep", "relevant": ["d2"]},
    ]
    folder = tmp_path / "corpus"
    (folder / "rows").mkdir(parents=True)
    (folder / "rows" / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def plan(corpus: Path, *words: str) -> Plan:
    flags = ["--corpus", str(corpus), "--split", "dev", "--model", "openai:m"]
    return plan_of(build_parser().parse_args(["eval", *flags, *words]), Console(quiet=True))


def test_rows_that_cannot_be_scored_are_left_out_and_no_other_split_is_needed(corpus: Path) -> None:
    assert [row.id for row in plan(corpus).rows] == ["1", "3"]
    assert [row.id for row in plan(corpus, "--limit", "2").rows] == ["1"]


def test_the_published_prompt_is_asked_and_its_answers_read_leniently(corpus: Path) -> None:
    first, second = plan(corpus, "--prompt", "original").rows
    published = plan(corpus, "--prompt", "original", "task.options.prefill=true")
    assert published.prompt_of(first).messages == "As\nUser: published\nAssistant: "
    assert published.prompt_of(first).prefix == PUBLISHED["prefix"]
    answer = published.task.parse('Let me.\n<think>so</think>\n<answer>{"query": "aspirin"}</answer>')
    assert getattr(answer, "query", None) == "aspirin"
    with pytest.raises(LaunchError, match="row '3' has no published prompt"):
        published.prompt_of(second)
    own = plan(corpus, "task.options.prefill=true")
    assert own.prompt_of(second).prefix == "<think>\n"
    assert own.prompt_of(second).messages == own.task.messages(second)


def test_standard_metrics_stay_within_what_the_engine_is_asked_for() -> None:
    config = with_standard_metrics(load_config(None, ["search.retmax=50", "task.metrics=[recall@20]"]))
    assert config.task.metrics == ("recall@20", "mrr", "ndcg@10", "hits@1", "hits@10", "recall@10")
    assert quality_metrics(task_of(config), config.task.metrics)[:2] == ["recall", "precision"]
    answers = load_config(None, ["task.name=evidence_seeking", "search.engine=bm25"])
    assert with_standard_metrics(answers) == answers
    assert "rank" not in quality_metrics(task_of(answers), ())


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--limit", "1"), set()),
        (("rewarder.concurrent_groups=3",), set()),
        (("--samples", "2"), {"sampling"}),
        (("sampling.max_tokens=9",), {"sampling"}),
        (("--prompt", "original"), {"sampling", "task"}),
        (("task.reasoning=false",), {"task"}),
        (("search.sort=relevance",), {"engine"}),
        (("actor.engine=transformers",), {"inference"}),
        (("--base-url", "http://127.0.0.1:8000/v1"), {"model"}),
    ],
)
def test_what_makes_it_another_evaluation(corpus: Path, words: tuple[str, ...], parts: set[str]) -> None:
    one, other = plan(corpus).fingerprint(), plan(corpus, *words).fingerprint()
    assert {part for part in one if one[part] != other[part]} == parts


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--samples", "2", "--prompt", "original", "--base-url", "http://127.0.0.1:8000/v1"), set()),
        (("task.prompt=short", "task.reasoning=false", "task.reward.scale=2", "task.metrics=[recall@10]"), set()),
        (("search.cache.mode=replay", "search.cache.folder=kept"), set()),
        (("search.retmax=7",), {"task"}),
        (("search.sort=relevance",), {"engine"}),
        (("search.url=http://127.0.0.1:9",), {"engine"}),
    ],
)
def test_what_may_not_share_a_column(corpus: Path, words: tuple[str, ...], parts: set[str]) -> None:
    one, other = plan(corpus).comparable(), plan(corpus, *words).comparable()
    assert {part for part in one if one[part] != other[part]} == parts


@pytest.mark.parametrize(
    ("words", "same"),
    [(("search.bm25.threads=3", "search.url=http://127.0.0.1:9"), True), (("search.bm25.b=0.7",), False)],
)
def test_a_local_index_is_the_same_wherever_it_is_served(corpus: Path, words: tuple[str, ...], same: bool) -> None:
    flags = ("--task", "ranking", "--engine", "bm25")
    assert (plan(corpus, *flags).comparable() == plan(corpus, *flags, *words).comparable()) is same


def test_other_rows_are_other_data(corpus: Path) -> None:
    before = plan(corpus).fingerprint()
    path = corpus / "rows" / "dev.jsonl"
    path.write_text(path.read_text().replace("sleep", "sleeping"))
    after = plan(corpus).fingerprint()
    assert [part for part in before if before[part] != after[part]] == ["data"]


def test_a_run_is_searched_anew_where_its_own_server_was(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "demo"
    run.mkdir(parents=True)
    own = "search: {url: 'http://127.0.0.1:4711', port: 4711, cache: {mode: record, folder: /kept}}\n"
    (run / "config.yaml").write_text(own + "data: {heldout_limit: 1, heldout_split: dev}\n")
    found = plan(corpus, str(run)).config.search
    assert (found.url, found.port, found.cache.mode) == (None, 0, "memory")
    assert [row.id for row in plan(corpus, str(run)).rows] == ["1"], "as many as the run's own evaluation looks at"
    again = plan(corpus, str(run), "search.url=http://127.0.0.1:4712").config.search
    assert again.url == "http://127.0.0.1:4712"
    replayed = plan(corpus, str(run), "--replay", str(tmp_path)).config.search
    assert (replayed.cache.mode, replayed.cache.folder) == ("replay", str(tmp_path))
