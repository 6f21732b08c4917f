"""Groups of samples as a GRPO policy writes them: repeated within a group, and from one epoch to the next.

How often queries repeat was counted in a demo run (a model of 0.95M parameters, 800 requests, 32 groups of 8 per step,
temperature 1, all samples recorded: `tracking.samples_per_step=100000`) in five phases of 25 steps, 3,680 trained
groups, 0 to 115 steps: `PHASES`. Groups whose rewards were all equal are not recorded, so the run repeated itself a
little more than this. A run that goes on repeats itself more and more; nothing is extrapolated here.

Samples of a group are seated as in the Chinese restaurant process (Aldous 1985; Pitman 2006, section 3.1) whose
chance that two of them are equal is the counted one. A query that is new in its group is, with the counted share, one
that this request was given in an earlier epoch.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.tasks import Row

GROUP = 8


@dataclass(frozen=True)
class Phase:
    """equal_pairs: share of the pairs of samples of a group that are equal. seen_before: share of the different
    queries of a group that an earlier group of the same request had, among groups whose request was seen before.
    """

    equal_pairs: float
    seen_before: float


PHASES = (Phase(0.0007, 0.005), Phase(0.0049, 0.015), Phase(0.0146, 0.034), Phase(0.0278, 0.062), Phase(0.0477, 0.112))


@dataclass(frozen=True)
class Group:
    """One group of the stream; `stale`: nobody waits for it any more when its turn comes."""

    row: Row
    texts: tuple[str, ...]
    queries: tuple[str | None, ...]  # None: the text is malformed
    stale: bool


class StreamWriter:
    """Writes the stream; the same one for the same seed.

    Args:
        malformed: share of the samples. stale: share of the groups.
    """

    def __init__(self, rows: Sequence[Row], malformed: float, stale: float, seed: int) -> None:
        self._rows = rows
        self._malformed = malformed
        self._stale = stale
        self._random = random.Random(seed)
        self._earlier: dict[str, list[str]] = {}
        self._written = 0

    def generated(self, groups: int) -> Iterator[Group]:
        """So many groups, an equal number from each phase, epoch after epoch over the requests."""
        for number in range(groups):
            phase = PHASES[number * len(PHASES) // groups]
            row = self._rows[number % len(self._rows)]
            yield self._finish(row, self._queries(row, phase))

    def recorded(self, path: Path) -> Iterator[Group]:
        """The groups of a run's samples.jsonl that has all samples."""
        rows = {row.id: row for row in self._rows}
        lines = (json.loads(line) for line in path.read_text().splitlines())
        for _, samples in itertools.groupby(lines, key=lambda line: (line["step"], line["ticket"])):
            group = list(samples)
            queries = [sample["query"] for sample in group if sample["query"]]
            if len(queries) == GROUP and group[0]["prompt_id"] in rows:
                yield self._finish(rows[group[0]["prompt_id"]], queries)

    def _finish(self, row: Row, queries: Iterable[str]) -> Group:
        kept = tuple(None if self._random.random() < self._malformed else query for query in queries)
        return Group(row, tuple(map(text_of, kept)), kept, self._random.random() < self._stale)

    def _queries(self, row: Row, phase: Phase) -> list[str]:
        concentration = 1 / phase.equal_pairs - 1  # two samples are equal with chance 1 / (1 + concentration)
        queries: list[str] = []
        earlier = list(self._earlier.get(row.id, ()))
        for seated in range(GROUP):
            if self._random.random() < seated / (seated + concentration):
                queries.append(self._random.choice(queries))
            elif earlier and self._random.random() < phase.seen_before:
                queries.append(earlier.pop(self._random.randrange(len(earlier))))
            else:
                queries.append(self._new_query(row))
        known = self._earlier.setdefault(row.id, [])
        known += [query for query in dict.fromkeys(queries) if query not in known]
        return queries

    def _new_query(self, row: Row) -> str:
        self._written += 1
        words = [word for word in row.text.replace(",", " ").replace(".", " ").split() if word.isalpha()]
        first, second = self._random.choices(words, k=2)
        return f"({first} AND {second}) OR nothing{self._written}"


def text_of(query: str | None) -> str:
    """A well-formed answer; without a query, one whose last tag is missing."""
    closing = "</answer>" if query is not None else ""
    return f"<think>These terms matter.</think>\n<answer>{json.dumps({'query': query or 'heart'})}{closing}"


def statistics_of(groups: Sequence[Group]) -> dict[str, Any]:
    """What repeats in a stream, as it is and not as it was meant."""
    samples = [query for group in groups for query in group.queries]
    formed = [query for query in samples if query is not None]
    pairs = equal = distinct = 0
    for group in groups:
        queries = [query for query in group.queries if query is not None]
        equal += sum(first == second for first, second in itertools.combinations(queries, 2))
        pairs += len(queries) * (len(queries) - 1) // 2
        distinct += len(set(queries))
    return {
        "groups": len(groups),
        "samples": len(samples),
        "malformed": round(1 - len(formed) / len(samples), 3),
        "stale": round(sum(group.stale for group in groups) / len(groups), 3),
        "equal_pairs": round(equal / pairs, 4),
        "repeated_in_group": round(1 - distinct / len(formed), 3),
        "repeated_at_all": round(1 - len(set(formed)) / len(formed), 3),
    }
