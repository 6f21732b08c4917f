"""Publication search: rewrite a request (often PICO) into the query that makes PubMed return the relevant
articles.

Reward: the recall tiers of DeepRetrieval (Jiang et al. 2025, arXiv 2503.00223, section on reward design, with
the values of its published code), or recall itself, or a mixture of both.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Final, Literal, get_args

import msgspec

from common.tasks.base import Message, PromptForm, Task, TaskRow, TaskScore

RewardKind = Literal["tiers", "recall", "mixture"]

DEFAULT_TIERS: Final = ((0.7, 5.0), (0.5, 4.0), (0.4, 3.0), (0.3, 1.0), (0.1, 0.5), (0.05, 0.1))

_ROLE: Final = """\
You are a clinical specialist who searches the biomedical literature for systematic reviews. You get a \
request and write the one search query that makes the search engine return the publications the request is \
about.

A request may be given by its PICO elements:
P - the patients, problem or population studied
I - the intervention or exposure of interest
C - what the intervention is compared with
O - the outcomes that are measured

The search engine understands the Boolean operators AND, OR and NOT in capitals, parentheses for grouping, \
"quoted phrases" and truncation with *. A query that is too narrow misses publications; one that is too \
broad buries them."""

_REASONING_FORMAT: Final = """\
First think about which terms matter, then answer. Put your thoughts between <think> and </think>, and after \
them the answer between <answer> and </answer>, as a JSON object with the single key "query" and nothing \
around it:
<think>
your thoughts
</think>
<answer>
{"query": "your search query"}
</answer>"""

_DIRECT_FORMAT: Final = """\
Answer at once, without explanation. Put the answer between <answer> and </answer>, as a JSON object with \
the single key "query" and nothing around it:
<answer>
{"query": "your search query"}
</answer>"""


class RewardTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a rewrite earns.

    tiers: (recall threshold, reward), thresholds falling within (0, 1]; the first threshold reached
    counts. miss: reward below the last threshold. bad_query: the engine refuses the query. format_bonus:
    added to all of these when the answer parses. format_penalty: the whole reward of an answer that does
    not parse. kind: "tiers"; "recall" = scale x recall (no tier, no miss); "mixture" = recall_weight of
    the second and the rest of the first. Raises ValueError for a table that is not finite or not ordered.
    """

    kind: RewardKind = "tiers"
    scale: float = 1.0
    tiers: tuple[tuple[float, float], ...] = DEFAULT_TIERS
    miss: float = -3.5
    bad_query: float = -4.0
    format_bonus: float = 1.0
    format_penalty: float = -4.0
    recall_weight: float = 0.5

    def __post_init__(self) -> None:
        thresholds = [threshold for threshold, _ in self.tiers]
        bounded = all(0.0 < threshold <= 1.0 for threshold in thresholds)
        falling = all(high > low for high, low in pairwise(thresholds))
        if not (thresholds and bounded and falling):
            raise ValueError(f"reward tiers need falling recall thresholds within (0, 1], got {thresholds}")
        numbers = [self.miss, self.bad_query, self.format_bonus, self.format_penalty, self.scale]
        if not all(math.isfinite(number) for number in [*numbers, *(reward for _, reward in self.tiers)]):
            raise ValueError("every reward must be a finite number")
        if not 0.0 <= self.recall_weight <= 1.0:
            raise ValueError(f"recall_weight must be within [0, 1], got {self.recall_weight}")
        if self.kind not in get_args(RewardKind):
            raise ValueError(f"reward kind must be one of {', '.join(get_args(RewardKind))}, got {self.kind!r}")

    def answer_reward(self, recall: float) -> float:
        """Reward of a query with this recall in [0, 1], without the format bonus."""
        weight = {"tiers": 0.0, "recall": 1.0, "mixture": self.recall_weight}[self.kind]
        return (1.0 - weight) * self._tier(recall) + weight * self.scale * recall

    def _tier(self, recall: float) -> float:
        return next((reward for threshold, reward in self.tiers if recall >= threshold), self.miss)


def retrieval_metrics(hits: Sequence[str], relevant: Collection[str], top_k: int) -> dict[str, float]:
    """Set recall and precision of the first top_k distinct hits.

    recall = |hits ∩ relevant| / |relevant| (all relevant ids, not min(k, relevant), as trec_eval does);
    precision = |hits ∩ relevant| / |hits|, 0 if nothing was returned. Raises ValueError if nothing is
    relevant.
    """
    wanted = set(relevant)
    if not wanted:
        raise ValueError("recall is undefined without a relevant id: leave such requests out of the data")
    returned = list(dict.fromkeys(hits))[:top_k]
    found = sum(hit in wanted for hit in returned)
    return {"recall": found / len(wanted), "precision": found / len(returned) if returned else 0.0}


class PublicationSearch(Task):
    """Publication search scored by recall over the first top_k ids (the paper's cap is 3,000)."""

    name = "publication_search"
    metric = "recall"

    def __init__(
        self,
        *,
        prompt: PromptForm = "full",
        reasoning: bool = True,
        prefill: bool = False,
        top_k: int = 3000,
        reward: RewardTable | None = None,
    ) -> None:
        """Raises ValueError if top_k is not positive."""
        super().__init__(prompt=prompt, reasoning=reasoning, prefill=prefill)
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        self._top_k = top_k
        self.reward = reward or RewardTable()

    @property
    def top_k(self) -> int:
        return self._top_k

    def messages(self, row: TaskRow) -> list[Message]:
        if self.prompt == "short":
            return [{"role": "user", "content": row.text}]
        answer_format = _REASONING_FORMAT if self.reasoning else _DIRECT_FORMAT
        return [
            {"role": "system", "content": f"{_ROLE}\n\n{answer_format}"},
            {"role": "user", "content": f"Find the publications for this request:\n{row.text.strip()}"},
        ]

    def score(self, row: TaskRow, hits: Sequence[str], count: int) -> TaskScore:
        metrics = retrieval_metrics(hits, row.relevant, self._top_k)
        reward = self.reward.format_bonus + self.reward.answer_reward(metrics["recall"])
        return TaskScore(reward=reward, metrics={**metrics, "results": float(count)})

    @property
    def format_reward(self) -> float:
        return self.reward.format_penalty

    @property
    def bad_query_reward(self) -> float:
        return self.reward.format_bonus + self.reward.bad_query


TASK = PublicationSearch
