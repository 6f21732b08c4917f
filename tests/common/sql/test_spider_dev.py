from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterator

import pytest

from common.sql.comparators import COMPARATORS, equal, prepare
from common.sql.table import Table
from common.sql.text import has_top_level_order
from tests.common.sql.official_rules import (
    TooManyOrdersError,
    bird_rule,
    drop_distinct,
    order_at_top,
    spider_rule,
    strict_rule,
)
from tests.common.sql.spider_dev import NO_DATA, Databases, Gold, folder, mutations, questions

pytestmark = pytest.mark.skipif(folder() is None, reason=NO_DATA)

# The plain rules compare every row with every row.
_MAX_PLAIN_ROWS = 250


@pytest.fixture(scope="module")
def databases() -> Iterator[Databases]:
    databases = Databases()
    yield databases
    databases.close()


@pytest.fixture(scope="module")
def golds() -> list[Gold]:
    return questions()


def small(*tables: Table) -> bool:
    return all(len(table.rows) <= _MAX_PLAIN_ROWS for table in tables)


def test_every_gold_query_equals_itself(golds: list[Gold], databases: Databases) -> None:
    assert len(golds) == 1034
    for gold in golds:
        result = databases.run(gold.database, gold.sql)
        assert result is not None, gold.sql
        assert len(result.rows) == gold.rows
        for name in COMPARATORS:
            prepared = databases.run(gold.database, prepare(name, gold.sql))
            assert prepared is not None, prepare(name, gold.sql)
            assert equal(name, prepared, prepared, gold.sql)


def test_order_is_read_from_the_text_alike(golds: list[Gold]) -> None:
    found = Counter((has_top_level_order(gold.sql), order_at_top(gold.sql)) for gold in golds)
    assert set(found) == {(True, True), (False, False)}
    assert found[True, True] > 200


def test_spider_executes_what_the_official_program_executes(golds: list[Gold], databases: Databases) -> None:
    changed = 0
    for gold in golds:
        ours, plain = prepare("spider", gold.sql), drop_distinct(gold.sql)
        changed += ours != gold.sql
        assert databases.run(gold.database, ours) == databases.run(gold.database, plain)
    assert changed > 50


def test_changed_queries_get_the_verdict_of_the_plain_rules(golds: list[Gold], databases: Databases) -> None:
    seen: defaultdict[str, Counter[bool]] = defaultdict(Counter)
    kinds: defaultdict[str, Counter[bool]] = defaultdict(Counter)
    undecided = 0
    for number, gold in enumerate(golds):
        for kind, changed in mutations(gold.sql, random.Random(number)):
            for name in COMPARATORS:
                left = databases.run(gold.database, prepare(name, gold.sql))
                right = databases.run(gold.database, prepare(name, changed))
                if left is None or right is None or not small(left, right):
                    continue
                try:
                    expected = plain_verdict(name, left, right, gold.sql)
                except TooManyOrdersError:
                    undecided += 1
                    continue
                assert equal(name, left, right, gold.sql) == expected, (name, gold.sql, changed)
                seen[name][expected] += 1
                kinds[kind][expected] += 1
    assert all(seen[name][verdict] > 1000 for name in COMPARATORS for verdict in (True, False)), seen
    # A result in no order may be sorted; every other kind of change was seen to be wrong somewhere.
    harmless = {kind for kind, verdicts in kinds.items() if not verdicts[False]}
    assert harmless == {"ordered", "ordered down"}, kinds
    assert len(kinds) > 20
    assert undecided < 50


def plain_verdict(name: str, gold: Table, predicted: Table, gold_sql: str) -> bool:
    if name == "bird":
        return bird_rule(gold.rows, predicted.rows)
    if name == "spider":
        return spider_rule(gold.rows, predicted.rows, gold_sql)
    columns = len(gold.columns), len(predicted.columns)
    return strict_rule(gold.rows, predicted.rows, columns, order_at_top(gold_sql))
