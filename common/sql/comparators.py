"""Does a predicted query return what the gold query returns? Three answers, by name.

| | `bird` | `spider` | `strict` |
| --- | --- | --- | --- |
| rows | a set: order and repeats do not count | a bag: repeats count | a bag |
| order of rows | never | if "order by" stands anywhere in the gold text | if the gold query itself has an ORDER BY |
| order of columns | counts | does not count | counts |
| number of columns | counts, unless both are empty | counts, unless both are empty | counts |
| cells | Python's `==` | Python's `==` | `==`, fractions within 1e-6 |
| DISTINCT | executed | taken out of both queries first | executed |

* `bird`: execution accuracy of BIRD (bird-bench/mini_dev, evaluation_ex.py), which its authors confirm as intended, and
  the rule of DeepRetrieval for both of its SQL sets. 1 equals 1.0, '1' does not equal 1, NULL equals NULL.
* `spider`: the test-suite accuracy of Spider (taoyds/test-suite-sql-eval, exec_eval.py, without --plug_value and
  --keep_distinct, on one database). Kept: "order by" of a subquery, or of a comment, makes order matter; COUNT(DISTINCT
  x) is compared as COUNT(x). Not kept, because they are accidents of the program: which column orders it tries above
  three columns depends on 20 random rows; rows that mix 1 and 1.0 fail its quick test although its own full
  comparison takes them as equal; IS DISTINCT FROM loses its DISTINCT; its repairs reach into quoted text; of several
  statements it silently runs the first.
* `strict`: what a user would call the same answer, for rewards without loopholes. The tolerance is for fractions only:
  two whole numbers are equal or they are not, however long they are.

Where rows tie within an ORDER BY, order is the engine's choice and none of the three can tell: both queries run on the
same file with the same engine, so ties mostly fall alike.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Final, Literal, get_args

from common.sql.columns import same_up_to_columns
from common.sql.table import Cell, Row, Table
from common.sql.text import has_top_level_order, repaired, without_distinct

ComparatorName = Literal["bird", "spider", "strict"]
COMPARATORS: Final[tuple[ComparatorName, ...]] = get_args(ComparatorName)

RELATIVE_TOLERANCE: Final = 1e-6
ABSOLUTE_TOLERANCE: Final = 1e-9
_MAX_MATCHED_ROWS: Final = 300
_NUMBER: Final = object()


def prepare(name: ComparatorName, sql: str) -> str:
    """Return the text to execute under this comparator, for the gold query and the predicted one alike.

    Raises ValueError for an unknown name.
    """
    _rule(name)
    return without_distinct(repaired(sql)) if name == "spider" else sql


def equal(name: ComparatorName, gold: Table, predicted: Table, gold_sql: str) -> bool:
    """Whether `predicted` is the answer `gold`. gold_sql: text of the gold query, which says whether order matters.

    A truncated prediction is never equal. Raises ValueError for an unknown name and for a truncated gold result,
    against which nobody can be right.
    """
    rule = _rule(name)
    if gold.truncated:
        raise ValueError("a truncated gold result cannot be compared with: raise the limits or leave its question out")
    return not predicted.truncated and rule(gold, predicted, gold_sql)


def bird(gold: Table, predicted: Table, gold_sql: str) -> bool:
    """Equal sets of rows."""
    return set(gold.rows) == set(predicted.rows)


def spider(gold: Table, predicted: Table, gold_sql: str) -> bool:
    """Equal bags, or lists, of rows for some order of the columns."""
    if not gold.rows and not predicted.rows:
        return True
    if len(gold.rows) != len(predicted.rows) or len(gold.rows[0]) != len(predicted.rows[0]):
        return False
    return same_up_to_columns(gold.rows, predicted.rows, ordered="order by" in gold_sql.lower())


def strict(gold: Table, predicted: Table, gold_sql: str) -> bool:
    """Equal bags, or lists, of rows, fractions within the tolerance."""
    if len(gold.columns) != len(predicted.columns) or len(gold.rows) != len(predicted.rows):
        return False
    if has_top_level_order(gold_sql):
        return all(map(_close_rows, gold.rows, predicted.rows))
    return _close_bags(gold.rows, predicted.rows)


_RULES: Final[dict[str, Callable[[Table, Table, str], bool]]] = {"bird": bird, "spider": spider, "strict": strict}


def _rule(name: str) -> Callable[[Table, Table, str], bool]:
    if name not in _RULES:
        raise ValueError(f"unknown SQL comparator {name!r}: choose one of {', '.join(COMPARATORS)}")
    return _RULES[name]


def _close(left: Cell, right: Cell) -> bool:
    if left == right:
        return True
    if not isinstance(left, int | float) or not isinstance(right, int | float):
        return False
    if _is_whole(left) and _is_whole(right):
        return False
    return math.isclose(left, right, rel_tol=RELATIVE_TOLERANCE, abs_tol=ABSOLUTE_TOLERANCE)


def _is_whole(number: float) -> bool:
    return isinstance(number, int) or number.is_integer()


def _close_rows(left: Row, right: Row) -> bool:
    return len(left) == len(right) and all(map(_close, left, right))


def _close_bags(gold: Sequence[Row], predicted: Sequence[Row]) -> bool:
    """Whether rows pair up one to one. Equal rows are paired first; the rest can only differ in its fractions."""
    missing, extra = Counter(gold), Counter(predicted)
    missing, extra = missing - extra, extra - missing
    left, right = _by_exact_part(missing), _by_exact_part(extra)
    return left.keys() == right.keys() and all(_pair_up(left[key], right[key]) for key in left)


def _by_exact_part(rows: Counter[Row]) -> dict[tuple[object, ...], list[Row]]:
    """Group rows by what the tolerance does not touch: everything but the numbers."""
    groups: defaultdict[tuple[object, ...], list[Row]] = defaultdict(list)
    for row in rows.elements():
        groups[tuple(_NUMBER if isinstance(cell, int | float) else cell for cell in row)].append(row)
    return groups


def _pair_up(left: list[Row], right: list[Row]) -> bool:
    """Whether the rows of one group pair up within the tolerance.

    In sorted order they nearly always do. Where noise swaps neighbours, a bipartite matching decides; above 300 rows,
    where it would take too long, sorted order has the last word.
    """
    if len(left) != len(right):
        return False
    numbers_left, numbers_right = sorted(map(_numbers, left)), sorted(map(_numbers, right))
    if all(map(_close_rows, numbers_left, numbers_right)):
        return True
    return len(left) <= _MAX_MATCHED_ROWS and _perfect_matching(numbers_left, numbers_right)


def _numbers(row: Row) -> tuple[int | float, ...]:
    return tuple(cell for cell in row if isinstance(cell, int | float))


def _perfect_matching(left: Sequence[Row], right: Sequence[Row]) -> bool:
    """Kuhn's algorithm: find an augmenting path for every row on the left."""
    partners = [[j for j, other in enumerate(right) if _close_rows(row, other)] for row in left]
    matched: dict[int, int] = {}

    def augment(i: int, seen: set[int]) -> bool:
        for j in partners[i]:
            if j not in seen:
                seen.add(j)
                if j not in matched or augment(matched[j], seen):
                    matched[j] = i
                    return True
        return False

    return all(augment(i, set()) for i in range(len(left)))
