"""The verdict on one generated text.

The promise: **an outage is never a bad query.** A score is exactly one of

* `Scored`: the query ran and was measured;
* `InvalidOutput`: the text itself is at fault (wrong format, or a query the engine refuses as wrong);
* `Unavailable`: the engine could not be asked. It has no reward, so none can be trained on by mistake.
"""

from __future__ import annotations

import math

import msgspec


class Scored(msgspec.Struct, frozen=True, tag="scored", tag_field="kind"):
    """The query ran.

    reward: what the learner trains on. metrics: recall, precision, … and the lengths think_chars,
    think_words, query_chars, query_words. query: what was searched. results: number of matches the engine
    counted.
    """

    reward: float
    metrics: dict[str, float]
    query: str
    results: int

    def __post_init__(self) -> None:
        _require_finite(self.reward, *self.metrics.values())


class InvalidOutput(msgspec.Struct, frozen=True, tag="invalid", tag_field="kind"):
    """The text is at fault. reward: the penalty. reason: why, e.g. "missing_tag" or "refused_query".

    metrics and query are filled when the text parsed and the engine refused the query; then detail says
    what it said.
    """

    reward: float
    reason: str
    metrics: dict[str, float] = {}
    query: str = ""
    detail: str = ""

    def __post_init__(self) -> None:
        _require_finite(self.reward, *self.metrics.values())


class Unavailable(msgspec.Struct, frozen=True, tag="unavailable", tag_field="kind"):
    """Nobody knows what the query is worth. reason: one line, free of keys. retry_after_s: seconds the
    engine asked to be left alone, None if it did not say.
    """

    reason: str
    retry_after_s: float | None = None

    def __post_init__(self) -> None:
        if self.retry_after_s is not None and not (math.isfinite(self.retry_after_s) and self.retry_after_s >= 0):
            raise ValueError(f"retry_after_s must be a finite number of seconds, got {self.retry_after_s}")


Score = Scored | InvalidOutput | Unavailable


def _require_finite(*numbers: float) -> None:
    """A NaN reward would poison a whole batch of advantages: refuse it where it would enter, on decoding
    too.
    """
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError("a score holds finite numbers only")
