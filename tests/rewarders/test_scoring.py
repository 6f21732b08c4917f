from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import msgspec
import pytest

from common.scores import InvalidOutput, Scored, Unavailable
from common.tasks import Outcome, ParsedAnswer, ParseFailure, Row
from common.tasks.publication_search import PublicationSearch
from rewarders.engines.base import BadQuery, EngineUnavailable, SearchEngine, SearchRequest, SearchResult
from rewarders.engines.pubmed import PubMedEngine, PubMedSettings
from rewarders.errors import ScoringError
from rewarders.retry import Retrier, RetryPolicy
from rewarders.scoring import Scorer
from rewarders.servers.pubmed import ServerSettings, serve
from tests.rewarders.search_scorer import search_scorer

ROW = Row("q1", "does aspirin help", ("1", "2", "3", "4"), max_date="2020/01/01")


class ListedEngine(SearchEngine):
    """Answers from a table of term -> ids; can be told to be down for a number of requests."""

    def __init__(self, table: dict[str, list[str]]) -> None:
        self.table = table
        self.requests: list[SearchRequest] = []
        self.down_for = 0
        self.retry_after_s: float | None = None

    async def check(self) -> None:
        pass

    async def search(self, request: SearchRequest) -> SearchResult:
        self.requests.append(request)
        await asyncio.sleep(0)
        if self.down_for > 0:
            self.down_for -= 1
            raise EngineUnavailable("HTTP 503", self.retry_after_s)
        if "((" in request.term:
            raise BadQuery("unbalanced parentheses")
        ids = self.table.get(request.term, [])
        return SearchResult(ids=tuple(ids[: request.retmax]), count=len(ids))


@pytest.fixture
def engine() -> ListedEngine:
    return ListedEngine({"all": ["1", "2", "3", "4"], "half": ["1", "9", "2"], "none": ["9"]})


@pytest.fixture
def scorer(engine: ListedEngine) -> Scorer:
    async def no_wait(_: float) -> None:
        await asyncio.sleep(0)

    retrier = Retrier(RetryPolicy(attempts=3), sleep=no_wait)
    return search_scorer(PublicationSearch(top_k=50), engine, sort="relevance", retrier=retrier)


def answer(query: str, think: str = "hm hm") -> str:
    return f'<think>{think}</think><answer>{{"query": "{query}"}}</answer>'


async def test_scored_query_carries_reward_metrics_and_lengths(scorer: Scorer, engine: ListedEngine) -> None:
    score = await scorer.score_text(answer("half"), ROW)
    assert score == Scored(
        reward=5.0,
        metrics={
            "recall": 0.5,
            "precision": 2 / 3,
            "results": 3.0,
            "format": 1.0,
            "tier": 0.5,
            "reward_format": 1.0,
            "reward_answer": 4.0,
            "think_chars": 5.0,
            "think_words": 2.0,
            "query_chars": 4.0,
            "query_words": 1.0,
        },
        query="half",
        results=3,
    )
    assert engine.requests == [SearchRequest("half", retmax=50, sort="relevance", max_date="2020/01/01")]


async def test_a_miss_is_scored(scorer: Scorer) -> None:
    score = await scorer.score_text(answer("none"), ROW)
    assert isinstance(score, Scored)
    assert (score.reward, score.metrics["recall"]) == (-2.5, 0.0)


async def test_malformed_text_costs_no_search(scorer: Scorer, engine: ListedEngine) -> None:
    refused = InvalidOutput(reward=-4.0, reason="missing_tag", metrics={"format": 0.0})
    assert await scorer.score_text("all", ROW) == refused
    broken = await scorer.score_text("<think></think><answer>all</answer>", ROW)
    assert broken == InvalidOutput(reward=-3.0, reason="not_json", metrics={"format": 0.0})
    assert engine.requests == []


async def test_refused_query_is_the_models_fault(scorer: Scorer, engine: ListedEngine) -> None:
    score = await scorer.score_text(answer("((half"), ROW)
    assert isinstance(score, InvalidOutput)
    assert (score.reward, score.reason, score.query) == (-3.0, "refused_query", "((half")
    assert score.detail == "unbalanced parentheses"
    assert score.metrics["query_chars"] == 6.0
    assert len(engine.requests) == 1


async def test_short_outage_is_waited_out(scorer: Scorer, engine: ListedEngine) -> None:
    engine.down_for = 2
    score = await scorer.score_text(answer("all"), ROW)
    assert isinstance(score, Scored)
    assert score.reward == 6.0


async def test_long_outage_is_unavailable_and_leaves_nothing_behind(scorer: Scorer, engine: ListedEngine) -> None:
    engine.down_for = 3
    engine.retry_after_s = 4.0
    assert await scorer.score_text(answer("all"), ROW) == Unavailable("HTTP 503", retry_after_s=4.0)
    again = await scorer.score_text(answer("all"), ROW)
    assert isinstance(again, Scored)
    assert again.reward == 6.0


async def test_group_keeps_order_and_asks_each_query_once(scorer: Scorer, engine: ListedEngine) -> None:
    texts = [answer("all"), "junk", answer("half"), answer("all"), answer("all", think="other"), answer("((")]
    scores = await scorer.score_group(texts, ROW)
    kinds = [type(score) for score in scores]
    assert kinds == [Scored, InvalidOutput, Scored, Scored, Scored, InvalidOutput]
    rewards = [score.reward for score in scores if not isinstance(score, Unavailable)]
    assert rewards == [6.0, -4.0, 5.0, 6.0, 6.0, -3.0]
    assert Counter(request.term for request in engine.requests) == {"all": 1, "half": 1, "((": 1}


async def test_group_of_nothing(scorer: Scorer) -> None:
    assert await scorer.score_group([], ROW) == []


async def test_dates_separate_equal_queries(scorer: Scorer, engine: ListedEngine) -> None:
    later = Row("q2", "later", ROW.relevant, max_date="2024/01/01")
    await scorer.score_text(answer("all"), ROW)
    await scorer.score_text(answer("all"), later)
    assert [request.max_date for request in engine.requests] == ["2020/01/01", "2024/01/01"]


async def test_no_outage_ever_becomes_a_reward(scorer: Scorer, engine: ListedEngine) -> None:
    engine.down_for = 10_000
    texts = [answer(query) for query in ("all", "half", "none", "((", "unknown")]
    scores = await scorer.score_group(texts * 10, ROW)
    assert {type(score) for score in scores} == {Unavailable}


class Broken(PublicationSearch):
    """A user's task with a fault in it."""

    def measure(self, row: Row, answer: ParsedAnswer, outcome: Outcome) -> dict[str, float]:
        return {"recall": 1 / len(row.metadata)}


async def test_code_that_fails_is_fatal_and_says_where(engine: ListedEngine) -> None:
    scorer = search_scorer(Broken(), engine)
    with pytest.raises(ScoringError, match=r"row 'q1': ZeroDivisionError: .* \(test_scoring.py, line \d+\)$"):
        await scorer.score_group([answer("all"), "malformed", answer("none")], ROW)


class Unbounded(PublicationSearch):
    """A user's task that measures no number."""

    def measure(self, row: Row, answer: ParsedAnswer, outcome: Outcome) -> dict[str, float]:
        return {"recall": 1.0, "precision": float("inf")}

    def parse(self, text: str) -> ParsedAnswer | ParseFailure:
        return super().parse(text[text.index("<think>") :])


async def test_whatever_the_tasks_own_code_does_is_fatal(engine: ListedEngine) -> None:
    scorer = search_scorer(Unbounded(), engine)
    with pytest.raises(ScoringError, match=r"row 'q1': .*finite"):
        await scorer.score_text(answer("all"), ROW)
    with pytest.raises(ScoringError, match="row 'q1': substring not found"):
        await scorer.score_text("no tags", ROW)


async def test_a_metric_without_a_number_is_fatal_and_is_named(engine: ListedEngine) -> None:
    name = f"{__name__}:not_a_number"
    scorer = search_scorer(PublicationSearch(metrics=[name]), engine)
    with pytest.raises(ScoringError, match=f"the metric {name} gave nan for row 'q1'"):
        await scorer.score_text(answer("all"), ROW)


def not_a_number(row: Row, answer: ParsedAnswer, outcome: Outcome) -> float:
    return float("nan")


async def test_a_row_that_cannot_be_searched_for_is_fatal(scorer: Scorer) -> None:
    with pytest.raises(ScoringError, match="row 'q1' cannot be searched for: a date must be"):
        await scorer.score_text(answer("all"), msgspec.structs.replace(ROW, max_date="yesterday"))


def test_the_rewarder_side_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, rewarders.scoring, rewarders.engines.pubmed, rewarders.baselines, common.statistics\n"
        "heavy = {'torch', 'transformers', 'vllm', 'tokenizers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


async def test_whole_path_over_http_with_a_quota_that_refuses(tmp_path: Path) -> None:
    documents = [{"_id": str(n), "title": "Aspirin", "text": f"trial {n} of stroke"} for n in range(1, 5)]
    documents += [{"_id": "9", "title": "Statins", "text": "a trial of cancer"}]
    (tmp_path / "corpus.jsonl").write_text("\n".join(json.dumps(document) for document in documents))
    local = ServerSettings(corpus=tmp_path, cache_folder=tmp_path / "index", quota=3, window_s=0.3, retry_after_s=0.5)
    row = Row("q1", "does aspirin help", ("1", "2", "3", "4"))
    queries = ["aspirin AND stroke", "statins", "aspirin AND (", "trial", "unicorns", "aspirin OR statins"]
    async with (
        await serve(local) as server,
        PubMedEngine(PubMedSettings(base_url=server.base_url, api_key_env=None)) as engine,
    ):
        retrier = Retrier(RetryPolicy(attempts=10, base_s=0.05, budget_burst=100.0))
        scorer = search_scorer(PublicationSearch(top_k=50), engine, retrier=retrier)
        scores = await scorer.score_group([answer(query) for query in queries], row)
    assert retrier.retries > 0
    recalls = [score.metrics["recall"] if isinstance(score, Scored) else None for score in scores]
    assert recalls == [1.0, 0.0, None, 1.0, 0.0, 1.0]
    assert isinstance(scores[2], InvalidOutput)
    assert scores[2].reason == "refused_query"
