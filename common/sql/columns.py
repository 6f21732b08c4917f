"""Equality of two bags of rows when the columns may stand in another order.

Ordered rows are easy: the columns, as vectors, must be the same bag. For unordered rows a search pairs one column after
another and after each pair splits the rows of both tables into classes of equal beginnings; the classes must have equal
sizes, or the pair is wrong. Columns whose values differ as bags are never paired, so real results leave next to nothing
to search. The worst case is as hard as graph isomorphism, and a model writes one of the two tables: the search has a
budget.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Final, TypeVar

from common.sql.table import Cell, Row

Column = tuple[Cell, ...]
V = TypeVar("V")

# About a second. A table that needs more is called different; the same order of columns is tried first of all.
_MAX_STEPS: Final = 2_000_000


def same_up_to_columns(left: Sequence[Row], right: Sequence[Row], *, ordered: bool) -> bool:
    """Whether some order of the columns makes the rows of `right` those of `left`: as lists if ordered, else as bags.

    Both have the same number of rows, at least one, and of columns. Deterministic; False for the (artificial) tables
    that would take more than a few million steps.
    """
    if ordered:
        return Counter(zip(*left, strict=True)) == Counter(zip(*right, strict=True))
    if Counter(left) == Counter(right):
        return True
    return _Search(left, right).run()


class _Search:
    """Depth-first search for a pairing of the columns."""

    def __init__(self, left: Sequence[Row], right: Sequence[Row]) -> None:
        self.left: list[Column] = list(zip(*left, strict=True))
        self.right: list[Column] = list(zip(*right, strict=True))
        self.rows = len(left)
        self.steps = 0

    def run(self) -> bool:
        by_bag: defaultdict[frozenset[tuple[Cell, int]], list[int]] = defaultdict(list)
        for j, column in enumerate(self.right):
            by_bag[_bag(column)].append(j)
        partners = [by_bag[_bag(column)] for column in self.left]
        # The column with the fewest partners first: it cuts the search down soonest.
        order = sorted(range(len(self.left)), key=lambda i: len(partners[i]))
        start = [0] * self.rows
        return self._extend([(i, partners[i]) for i in order], frozenset(), start, start)

    def _extend(
        self, todo: list[tuple[int, list[int]]], used: frozenset[int], classes: list[int], others: list[int]
    ) -> bool:
        """Pair the first column of todo, then the rest. classes, others: the class of every row so far."""
        if not todo:
            return True
        (column, partners), rest = todo[0], todo[1:]
        tried: set[Column] = set()
        for partner in partners:
            vector = self.right[partner]
            if partner in used or vector in tried:
                continue
            tried.add(vector)
            self.steps += self.rows
            if self.steps > _MAX_STEPS:
                return False
            names: dict[tuple[int, Cell], int] = {}
            mine = _split(classes, self.left[column], names)
            theirs = _split(others, vector, names)
            if _bag(mine) == _bag(theirs) and self._extend(rest, used | {partner}, mine, theirs):
                return True
        return False


def _bag(values: Iterable[V]) -> frozenset[tuple[V, int]]:
    return frozenset(Counter(values).items())


def _split(classes: list[int], column: Column, names: dict[tuple[int, Cell], int]) -> list[int]:
    """Number the pairs (class, value); equal pairs of both tables get one number."""
    return [names.setdefault(pair, len(names)) for pair in zip(classes, column, strict=True)]
