"""The rules of the official evaluators, written down again as plainly as possible and without regard for cost.

Nothing here is shared with the code under test: no tokenizer, no search, no counting.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

Row = tuple[Any, ...]
# Column orders the plain rule tries before it gives up.
MAX_ORDERS = 50_000


class TooManyOrdersError(Exception):
    """The plain rule cannot decide this pair in reasonable time."""


def bird_rule(gold: Sequence[Row], predicted: Sequence[Row]) -> bool:
    """Every row of the one is a row of the other."""
    return all(row in predicted for row in gold) and all(row in gold for row in predicted)


def spider_rule(gold: Sequence[Row], predicted: Sequence[Row], gold_sql: str) -> bool:
    """Some order of the predicted columns gives the gold rows, in their order if the gold text has "order by"."""
    if not gold and not predicted:
        return True
    if len(gold) != len(predicted) or len(gold[0]) != len(predicted[0]):
        return False
    for order in _column_orders(gold, predicted):
        moved = [tuple(row[i] for i in order) for row in predicted]
        if "order by" in gold_sql.lower():
            if moved == list(gold):
                return True
        elif same_bag(gold, moved):
            return True
    return False


def strict_rule(gold: Sequence[Row], predicted: Sequence[Row], columns: tuple[int, int], ordered: bool) -> bool:
    """The same rows in the same columns, for tables without near ties between fractions."""
    if columns[0] != columns[1] or len(gold) != len(predicted):
        return False
    if ordered:
        return all(map(_near, gold, predicted))
    remaining = list(predicted)
    for row in gold:
        partner = next((i for i, other in enumerate(remaining) if _near(row, other)), None)
        if partner is None:
            return False
        del remaining[partner]
    return True


def same_bag(left: Sequence[Row], right: Sequence[Row]) -> bool:
    """Take every row of the left out of the right; nothing may be missing or left over."""
    remaining = list(right)
    for row in left:
        if row not in remaining:
            return False
        remaining.remove(row)
    return not remaining


def order_at_top(sql: str) -> bool:
    """Whether ORDER BY stands outside parentheses, for queries without quoted parentheses."""
    flat = re.sub(r"'[^']*'|\"[^\"]*\"", "", sql)
    while "(" in flat:
        shorter = re.sub(r"\([^()]*\)", "", flat)
        if shorter == flat:
            break
        flat = shorter
    return re.search(r"\border\s+by\b", flat, re.IGNORECASE) is not None


def drop_distinct(sql: str) -> str:
    """DISTINCT taken out of a query that quotes no such word."""
    return re.sub(r"\bdistinct\b", "", sql, flags=re.IGNORECASE)


def _column_orders(gold: Sequence[Row], predicted: Sequence[Row]) -> Iterator[tuple[int, ...]]:
    """All orders whose columns hold only values of the gold column; the official program samples rows for this."""
    width = len(gold[0])
    allowed = [
        [j for j in range(width) if {row[j] for row in predicted} == {row[i] for row in gold}] for i in range(width)
    ]
    if math.prod(map(len, allowed)) > MAX_ORDERS:
        raise TooManyOrdersError
    return (order for order in itertools.product(*allowed) if len(set(order)) == width)


def _near(left: Row, right: Row) -> bool:
    return len(left) == len(right) and all(map(_near_cells, left, right))


def _near_cells(left: Any, right: Any) -> bool:
    if isinstance(left, str | bytes | None) or isinstance(right, str | bytes | None):
        return bool(left == right)
    if left == int(left) and right == int(right):
        return bool(left == right)
    return abs(left - right) <= max(1e-9, 1e-6 * max(abs(left), abs(right)))
