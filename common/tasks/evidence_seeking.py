"""Evidence seeking: rewrite a question into the query that brings a passage with its answer to the top.

Reward: tiers over the rank of the first passage that holds an answer, as in DeepRetrieval (Jiang et al. 2025,
arXiv 2503.00223) for Natural Questions, TriviaQA and SQuAD. The answer rule is DPR's (`common.metrics.answers`).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any, Final, Literal, get_args

from common.metrics.answers import AnswerRule, first_with_answer
from common.tasks.answer import ParsedAnswer
from common.tasks.base import Task, ranking_of
from common.tasks.outcome import EngineKind, Hits, Outcome
from common.tasks.prompts import RETRIEVERS, Retriever
from common.tasks.reward import RewardTable
from common.tasks.row import Row

EvidenceData = Literal["nq", "triviaqa", "squad", "other"]

RANK_TIERS: Final = ((5.0, 5.0), (20.0, 4.0), (50.0, 2.0), (100.0, 1.0), (1000.0, 0.5), (3000.0, 0.1))
REWARD: Final = RewardTable(metric="rank", tiers=RANK_TIERS)
SQUAD_REWARD: Final = RewardTable(metric="rank", tiers=RANK_TIERS, miss=-2.5, bad_query=-3.0)

_CUTS: Final = (1, 5, 20, 100)
_ROLE: Final = """\
You rewrite questions for a search engine over the passages of Wikipedia. You get a question and write the one \
search query that brings a passage with its answer to the top of the results.

"""


class EvidenceSeeking(Task):
    """Evidence seeking scored by the rank of the first passage that holds an answer, within top_k."""

    name = "evidence_seeking"
    metric = "hits@20"
    measures = frozenset({"rank", "mrr", *(f"hits@{k}" for k in _CUTS)})
    request_line = "Find a passage that answers this question:"
    think_about = "what the answer may be and which words stand near it"
    needs = ("answers",)
    needs_texts = True
    default_top_k = 3000

    def __init__(
        self,
        *,
        dataset: EvidenceData = "other",
        retriever: Retriever = "bm25",
        rule: AnswerRule = "string",
        titles: bool = True,
        **options: Any,
    ) -> None:
        """dataset: whose reward table (SQuAD's misses cost less). retriever: what the engine understands.

        rule: answers are strings, or patterns ("regex", CuratedTREC). titles: the title of a passage counts as
        its first line, as in the original; DPR's own evaluation looks at the text alone. Other options as `Task`.
        """
        _require(dataset, get_args(EvidenceData), "dataset")
        _require(retriever, get_args(Retriever), "retriever")
        _require(rule, get_args(AnswerRule), "rule")
        self.role = _ROLE + RETRIEVERS[retriever]
        self.engines: frozenset[EngineKind] = frozenset({"dense"} if retriever == "dense" else {"bm25"})
        self.default_reward = SQUAD_REWARD if dataset == "squad" else REWARD
        self.retriever = retriever
        self.rule: AnswerRule = rule
        self.titles = titles
        super().__init__(**options)

    def measure(self, row: Row, answer: ParsedAnswer, outcome: Outcome) -> dict[str, float]:
        """`rank` (only where a passage holds an answer), `mrr`, `hits@k`."""
        passages = islice(self._passages(ranking_of(self, outcome)), self.top_k)
        rank = first_with_answer(passages, row.answers, self.rule)
        metrics = {f"hits@{k}": float(0 < rank <= k) for k in _CUTS} | {"mrr": 1.0 / rank if rank else 0.0}
        return {**metrics, "rank": float(rank)} if rank else metrics

    def _passages(self, hits: Hits) -> Iterable[str]:
        texts = hits.texts or ()
        if not self.titles or hits.titles is None:
            return texts
        return (f"{title}\n{text}" for title, text in zip(hits.titles, texts, strict=True))


def _require(value: str, known: tuple[str, ...], option: str) -> None:
    if value not in known:
        raise ValueError(f"{option} must be one of {', '.join(known)}, got {value!r}")


TASK = EvidenceSeeking
