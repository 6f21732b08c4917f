"""Metrics of one ranking against the judgments of one request, as trec_eval defines them.

A ranking is a sequence of document ids, best first; an id that comes again counts where it stood first. Judgments
map ids to grades; an id is relevant if its grade is above zero, and an id without a grade is not. Rewarders call
these once per sample: 3,000 ids cost some tenths of a millisecond. tests/common/metrics holds them to `ir_measures`.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Final

Judgments = Mapping[str, float]
RankingMetric = Callable[[Sequence[str], Judgments], float]


def distinct(ranking: Iterable[str], k: int | None = None) -> list[str]:
    """The ranking without repeats, cut after k ids (None: whole)."""
    if k is None or (isinstance(ranking, Sequence) and len(ranking) <= k):
        return list(dict.fromkeys(ranking))
    first: dict[str, None] = {}
    for document in ranking:
        if len(first) >= k:
            break
        first[document] = None
    return list(first)


def recall(ranking: Sequence[str], judgments: Judgments, k: int | None = None) -> float:
    """Share of ALL relevant ids that stand among the first k (None: anywhere).

    Raises ValueError if nothing is relevant.
    """
    wanted = _relevant(judgments)
    if not wanted:
        raise ValueError(_NOTHING_RELEVANT)
    return len(wanted.intersection(distinct(ranking, k))) / len(wanted)


def precision(ranking: Sequence[str], judgments: Judgments, k: int | None = None) -> float:
    """Share of relevant ids among the first k places, empty ones included, as trec_eval's P_k.

    k None: among the ids that were returned (set precision), 0 if there are none.
    """
    returned = distinct(ranking, k)
    places = len(returned) if k is None else k
    return len(_relevant(judgments).intersection(returned)) / places if places else 0.0


def hits(ranking: Sequence[str], judgments: Judgments, k: int | None = None) -> float:
    """1 if a relevant id stands among the first k (None: anywhere), else 0. Also called success or accuracy."""
    return 1.0 if first_relevant_rank(ranking, judgments, k) else 0.0


def reciprocal_rank(ranking: Sequence[str], judgments: Judgments, k: int | None = None) -> float:
    """1 / rank of the first relevant id among the first k (None: anywhere), 0 if there is none. Its mean is MRR."""
    rank = first_relevant_rank(ranking, judgments, k)
    return 1.0 / rank if rank else 0.0


def first_relevant_rank(ranking: Sequence[str], judgments: Judgments, k: int | None = None) -> int:
    """Rank, counted from 1, of the first relevant id among the first k; 0 if there is none."""
    for rank, document in enumerate(distinct(ranking, k), start=1):
        if judgments.get(document, 0) > 0:
            return rank
    return 0


def ndcg(ranking: Sequence[str], judgments: Judgments, k: int | None = None) -> float:
    """Normalised discounted cumulative gain of the first k (None: all), with trec_eval's linear gain.

    DCG = sum of grade / log2(rank + 1) over relevant ids; divided by the DCG of the best possible order of all
    judged ids, cut at k as well. Raises ValueError if nothing is relevant.
    """
    ideal = sorted((grade for grade in judgments.values() if grade > 0), reverse=True)
    if not ideal:
        raise ValueError(_NOTHING_RELEVANT)
    gains = [judgments.get(document, 0) for document in distinct(ranking, k)]
    return _dcg(gains) / _dcg(ideal[:k])


def f_measure(precision: float, recall: float, beta: float = 1.0) -> float:
    """(1 + beta²) P R / (beta² P + R): beta below 1 weighs precision more, above 1 recall. 0 where P = R = 0."""
    weighted = beta * beta * precision + recall
    return (1.0 + beta * beta) * precision * recall / weighted if weighted > 0 else 0.0


def retrieval_metrics(ranking: Sequence[str], relevant: Collection[str], top_k: int) -> dict[str, float]:
    """Set recall and set precision of the first top_k distinct ids.

    Raises ValueError if nothing is relevant.
    """
    wanted = set(relevant)
    if not wanted:
        raise ValueError(_NOTHING_RELEVANT)
    returned = distinct(ranking, top_k)
    found = len(wanted.intersection(returned))
    return {"recall": found / len(wanted), "precision": found / len(returned) if returned else 0.0}


def metric_named(name: str) -> RankingMetric:
    """The metric a configuration names.

    `recall`, `precision`, `hits`, `mrr` and `ndcg` look at everything returned, `recall@10` at the first 10;
    `f1`, `f0.5`, `f2` are the F-measure of set precision and set recall with that beta. Raises ValueError for
    any other name, with the closest known one.
    """
    if match := _F_NAME.fullmatch(name):
        return partial(_set_f, beta=float(match["beta"]))
    if match := _family(name):
        return partial(_FAMILIES[match["family"]], k=int(match["k"]) if match["k"] else None)
    close = difflib.get_close_matches(name, [*_FAMILIES, *(f"{known}@10" for known in _FAMILIES)], n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(_FAMILIES)}, each also as name@k; f1, f0.5"
    raise ValueError(f"unknown metric {name!r}: {hint}")


def is_ranking_metric(name: str) -> bool:
    """Whether `metric_named` knows this name."""
    return _F_NAME.fullmatch(name) is not None or _family(name) is not None


def _family(name: str) -> re.Match[str] | None:
    match = _CUT_NAME.fullmatch(name)
    return match if match and match["family"] in _FAMILIES else None


def _set_f(ranking: Sequence[str], judgments: Judgments, beta: float) -> float:
    return f_measure(precision(ranking, judgments), recall(ranking, judgments), beta)


def _relevant(judgments: Judgments) -> set[str]:
    return {document for document, grade in judgments.items() if grade > 0}


def _dcg(gains: Sequence[float]) -> float:
    discounts = _discounts(len(gains))
    return sum(gain * discounts[place] for place, gain in enumerate(gains) if gain > 0)


@lru_cache(maxsize=64)
def _discounts(places: int) -> tuple[float, ...]:
    return tuple(1.0 / math.log2(rank + 1) for rank in range(1, places + 1))


_NOTHING_RELEVANT: Final = "recall and nDCG are undefined without a relevant id: leave such requests out of the data"
_F_NAME: Final = re.compile(r"f(?P<beta>\d+(\.\d+)?)", re.ASCII)
_CUT_NAME: Final = re.compile(r"(?P<family>[a-z]+)(@(?P<k>[1-9]\d*))?", re.ASCII)
_FAMILIES: Final[dict[str, Callable[..., float]]] = {
    "recall": recall,
    "precision": precision,
    "hits": hits,
    "mrr": reciprocal_rank,
    "ndcg": ndcg,
}
