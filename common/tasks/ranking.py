"""Ranking: rewrite a request into the query with which a first-stage retriever ranks the relevant documents high.

Reward: nDCG at the cut-off of DeepRetrieval (Jiang et al. 2025, arXiv 2503.00223, with the values of its published
code) for sets of BEIR (Thakur et al. 2021) and MS MARCO, sparse and dense.
"""

from __future__ import annotations

from typing import Any, Final

from common.metrics.ranking import distinct, ndcg, recall
from common.tasks.answer import ParsedAnswer
from common.tasks.base import Task, ranking_of
from common.tasks.outcome import EngineKind, Outcome
from common.tasks.prompts import RETRIEVERS, Retriever
from common.tasks.reward import RewardTable
from common.tasks.row import Row

EVALUATED_AT: Final = 10

# What a request is and what is looked for; cut-off of the reward with BM25 and with a dense retriever.
_DATA: Final[dict[str, tuple[str, int, int]]] = {
    "scifact": ("a scientific claim and look for abstracts of papers that support or refute it", 50, 1000),
    "nfcorpus": ("a question or topic of nutrition and health and look for medical articles about it", 1000, 100),
    "fever": ("a claim and look for passages of Wikipedia that support or refute it", 1000, 1000),
    "hotpotqa": (
        "a question that only two passages of Wikipedia together can answer and look for both of them, also where "
        "the second one is not named",
        3000,
        1000,
    ),
    "fiqa": ("a question about finance and look for posts that answer it", 1000, 1000),
    "msmarco_beir": (
        "a question as people type it into a search engine and look for passages that answer it",
        1000,
        1000,
    ),
    "msmarco_health": ("a question about health and look for passages of web pages that answer it", 10, 10),
    "msmarco_science": ("a question about science and look for passages of web pages that answer it", 10, 10),
    "msmarco_tech": ("a question about technology and look for passages of web pages that answer it", 10, 10),
    "other": ("a request and look for the documents it asks for", 1000, 1000),
}


class Ranking(Task):
    """Ranking scored by nDCG at top_k; evaluations report nDCG@10."""

    name = "ranking"
    metric = f"ndcg@{EVALUATED_AT}"
    default_top_k = 1000

    def __init__(
        self, *, dataset: str = "other", retriever: Retriever = "bm25", top_k: int | None = None, **options: Any
    ) -> None:
        """dataset: whose wording and cut-off. retriever: what the engine understands. top_k: other cut-off of
        engine and reward. Other options as `Task`.
        """
        if dataset not in _DATA:
            raise ValueError(f"dataset must be one of {', '.join(_DATA)}, got {dataset!r}")
        if retriever not in RETRIEVERS:
            raise ValueError(f"retriever must be one of {', '.join(RETRIEVERS)}, got {retriever!r}")
        wording, sparse_k, dense_k = _DATA[dataset]
        dense = retriever == "dense"
        k = top_k or (dense_k if dense else sparse_k)
        self.role = (
            f"You write queries for a search engine. You get {wording}. Write the one search query that brings them "
            f"to the top of the results.\n\n{RETRIEVERS[retriever]}"
        )
        self.engines: frozenset[EngineKind] = frozenset({"dense"} if dense else {"bm25"})
        self.retriever = retriever
        self.measures = frozenset({f"ndcg@{k}", f"recall@{k}"})
        self.default_reward = reward_at(k)
        super().__init__(top_k=k if top_k is None else top_k, **options)

    def measure(self, row: Row, answer: ParsedAnswer, outcome: Outcome) -> dict[str, float]:
        """nDCG at 10 and at top_k, and recall at top_k."""
        judgments = row.judgments
        documents = distinct(ranking_of(self, outcome).ids, self.top_k)
        return {
            self.metric: ndcg(documents, judgments, EVALUATED_AT),
            f"ndcg@{self.top_k}": ndcg(documents, judgments, self.top_k),
            f"recall@{self.top_k}": recall(documents, judgments),
        }


def reward_at(k: int) -> RewardTable:
    """The original's reward: nDCG@k, and 0.1 for the format only where something relevant was found."""
    return RewardTable(
        kind="metric",
        metric=f"ndcg@{k}",
        bad_query=0.0,
        format_bonus=0.1,
        format_penalty=-2.0,
        json_penalty=-2.0,
        bonus_needs_gain=True,
        miss=0.0,
    )


TASK = Ranking
