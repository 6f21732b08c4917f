"""From metrics to a reward: small pure pieces that a configuration puts together.

Every task has a `RewardTable` of its own, with the values of DeepRetrieval's published code (Jiang et al. 2025,
arXiv 2503.00223, section on reward design). Anything with the signature of `Reward` can stand in its place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Final, Literal, Protocol, get_args

import msgspec

from common.metrics.ranking import is_ranking_metric

RewardKind = Literal["tiers", "metric", "mixture"]
CostUnit = Literal["unit", "doubling"]

SEARCH_TIERS: Final = ((0.7, 5.0), (0.5, 4.0), (0.4, 3.0), (0.3, 1.0), (0.1, 0.5), (0.05, 0.1))
RANK: Final = "rank"  # the one metric of which less is better; absent where nothing was found


class Grade(msgspec.Struct, frozen=True):
    """total: the reward. parts: what it is made of, for the metrics."""

    total: float
    parts: dict[str, float]


class Reward(Protocol):
    """Grades a well-formed answer, and says what the others earn."""

    @property
    def metrics(self) -> frozenset[str]:
        """Names of the metrics it looks at."""

    @property
    def malformed(self) -> float:
        """Reward of a text without the right tags."""

    @property
    def bad_answer(self) -> float:
        """Reward of right tags around something that is no answer (broken JSON, a missing key)."""

    @property
    def refused(self) -> float:
        """Reward of a well-formed answer whose query the engine refuses as wrong, never of an outage."""

    def grade(self, metrics: Mapping[str, float]) -> Grade:
        """Reward of an answer that was measured. A metric that is absent was not reached."""


class Cost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What too much of something costs, e.g. of query_words or of results.

    Up to `free` nothing; beyond it `each` per unit, or per doubling of `free`; never more than `most`.
    """

    each: float
    free: float = 0.0
    most: float = 1.0
    per: CostUnit = "unit"

    def __post_init__(self) -> None:
        if not all(math.isfinite(number) and number >= 0 for number in (self.each, self.free, self.most)):
            raise ValueError("a cost's each, free and most must be finite and not negative")
        if self.per not in get_args(CostUnit):
            raise ValueError(f"a cost is per {' or '.join(get_args(CostUnit))}, got {self.per!r}")
        if self.per == "doubling" and self.free <= 0:
            raise ValueError("a cost per doubling needs `free` above zero: doubling of what?")

    def of(self, amount: float) -> float:
        """The cost of this amount, within [0, most]."""
        if amount <= self.free:
            return 0.0
        units = math.log2(amount / self.free) if self.per == "doubling" else amount - self.free
        return min(self.most, self.each * units)


class RewardTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a rewrite earns. The defaults are those of search by recall.

    metric: what is rewarded: one metric, or several with their weights, which are added up.

    kind: "tiers"; "metric" = scale x metric, continuous, without tier or miss; "mixture" = metric_weight of the
    latter and the rest of the former.

    tiers: (threshold, reward). Thresholds fall, and the first one the metric reaches counts; for `rank` they rise,
    and the first one it does not exceed counts. miss: reward beyond the last threshold.

    format_bonus: added to what a well-formed answer earns; with bonus_needs_gain only if that is above zero.
    format_penalty: whole reward of a text without the right tags. bad_query: the engine refuses the query; the
    bonus is added to it too. json_penalty: whole reward of right tags around no usable answer, None: as a query
    that is refused.

    costs: metric -> what too much of it costs; taken from the reward of a well-formed answer.

    Raises ValueError for a table that is not finite or not ordered.
    """

    kind: RewardKind = "tiers"
    metric: str | dict[str, float] = "recall"
    scale: float = 1.0
    tiers: tuple[tuple[float, float], ...] = SEARCH_TIERS
    miss: float = -3.5
    bad_query: float = -4.0
    format_bonus: float = 1.0
    format_penalty: float = -4.0
    json_penalty: float | None = None
    metric_weight: float = 0.5
    bonus_needs_gain: bool = False
    costs: dict[str, Cost] = {}

    def __post_init__(self) -> None:
        if self.kind not in get_args(RewardKind):
            raise ValueError(f"reward kind must be one of {', '.join(get_args(RewardKind))}, got {self.kind!r}")
        self._check_metric()
        if self.kind != "metric":
            self._check_tiers()
        numbers = [self.miss, self.bad_query, self.format_bonus, self.format_penalty, self.scale]
        numbers += [self.json_penalty or 0.0, *self._weights.values(), *(reward for _, reward in self.tiers)]
        if not all(math.isfinite(number) for number in numbers):
            raise ValueError("every reward must be a finite number")
        if not 0.0 <= self.metric_weight <= 1.0:
            raise ValueError(f"metric_weight must be within [0, 1], got {self.metric_weight}")

    @property
    def metrics(self) -> frozenset[str]:
        """Names of the metrics it looks at."""
        return frozenset(self._weights) | frozenset(self.costs)

    @property
    def malformed(self) -> float:
        """Reward of a text without the right tags."""
        return self.format_penalty

    @property
    def bad_answer(self) -> float:
        """Reward of right tags around no usable answer."""
        return self.refused if self.json_penalty is None else self.json_penalty

    @property
    def refused(self) -> float:
        """Reward of a query the engine refuses."""
        return self.bad_query + self._bonus(self.bad_query)

    def grade(self, metrics: Mapping[str, float]) -> Grade:
        """Reward of an answer that was measured; its parts are `tier` (the threshold reached, 0 for none) and
        the summands `reward_format`, `reward_answer`, `reward_cost`, where they apply.
        """
        amounts = [weight * metrics[name] for name, weight in self._weights.items() if name in metrics]
        amount = sum(amounts) if len(amounts) == len(self._weights) else None
        parts: dict[str, float] = {}
        weight = {"tiers": 0.0, "metric": 1.0, "mixture": self.metric_weight}[self.kind]
        answer = weight * self.scale * (amount or 0.0)
        if self.kind != "metric":
            parts["tier"], tier = self._tier(amount)
            answer += (1.0 - weight) * tier
        parts |= {"reward_format": self._bonus(answer), "reward_answer": answer}
        if self.costs:
            parts["reward_cost"] = -sum(cost.of(metrics.get(name, 0.0)) for name, cost in self.costs.items())
        return Grade(sum(value for name, value in parts.items() if name != "tier"), parts)

    def but(self, changes: Mapping[str, Any]) -> RewardTable:
        """This table with some fields changed, as a configuration gives them.

        Raises ValueError for a field it does not have or a value of the wrong type.
        """
        try:
            return msgspec.convert({**msgspec.to_builtins(self), **changes}, RewardTable)
        except msgspec.ValidationError as error:
            raise ValueError(f"task.reward: {error}") from None

    @property
    def _weights(self) -> dict[str, float]:
        return {self.metric: 1.0} if isinstance(self.metric, str) else self.metric

    def _bonus(self, earned: float) -> float:
        return self.format_bonus if earned > 0 or not self.bonus_needs_gain else 0.0

    def _tier(self, amount: float | None) -> tuple[float, float]:
        if amount is None:
            return 0.0, self.miss
        for threshold, reward in self.tiers:
            if (amount <= threshold) if self.metric == RANK else (amount >= threshold):
                return threshold, reward
        return 0.0, self.miss

    def _check_metric(self) -> None:
        if not self._weights:
            raise ValueError("a reward needs a metric: name one, or several with their weights")
        if RANK in self._weights and (self.kind != "tiers" or self.metric != RANK):
            raise ValueError(f"{RANK!r} falls as the answer gets better, so it goes with tiers only: use 'mrr'")

    def _check_tiers(self) -> None:
        thresholds = [threshold for threshold, _ in self.tiers]
        if self.metric == RANK:
            if not (thresholds and thresholds[0] >= 1 and all(low < high for low, high in pairwise(thresholds))):
                raise ValueError(f"reward tiers over {RANK!r} need rising ranks from 1 on, got {thresholds}")
            return
        highest = sum(self._weights.values()) if all(map(is_ranking_metric, self._weights)) else math.inf
        falling = all(high > low for high, low in pairwise(thresholds))
        if not (thresholds and falling and thresholds[-1] > 0 and thresholds[0] <= highest):
            raise ValueError(f"reward tiers need falling thresholds within (0, {highest:g}], got {thresholds}")
