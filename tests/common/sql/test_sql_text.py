from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.sql.text import has_top_level_order, repaired, tokens, unstable, without_distinct

pieces = st.sampled_from(
    [
        "SELECT",
        " ",
        "'",
        '"',
        "`",
        "[",
        "]",
        "(",
        ")",
        "--",
        "/*",
        "*/",
        "\n",
        "order",
        "by",
        "distinct",
        "is",
        "1e5",
        "é",
        ";",
    ]
)
texts = st.one_of(st.text(), st.lists(pieces).map("".join))


@given(texts)
def test_any_text_is_cut_into_tokens_that_are_it(sql: str) -> None:
    assert "".join(token.text for token in tokens(sql)) == sql
    has_top_level_order(sql)
    repaired(sql)
    unstable(sql)


@given(texts)
def test_taking_distinct_out_twice_is_taking_it_out_once(sql: str) -> None:
    once = without_distinct(sql)
    assert without_distinct(once) == once or "is" in sql.lower()
    assert len(once) <= len(sql)


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("SELECT DISTINCT a FROM t", "SELECT  a FROM t"),
        ("select count(distinct a) from t", "select count( a) from t"),
        ("SELECT DISTINCT(a) FROM t", "SELECT (a) FROM t"),
        ("SELECT 'distinct', \"Distinct\", [distinct], `distinct` FROM t", None),
        ("SELECT a FROM t -- distinct\n", None),
        ("SELECT a FROM t /* distinct */", None),
        ("SELECT distinct_id, distinctly FROM t", None),
        ("SELECT a FROM t WHERE a IS DISTINCT FROM b", None),
        ("SELECT a FROM t WHERE a IS NOT DISTINCT FROM b", None),
        ("SELECT a FROM t UNION SELECT DISTINCT b FROM u", "SELECT a FROM t UNION SELECT  b FROM u"),
        ("SELECT 'it''s distinct' , DISTINCT", "SELECT 'it''s distinct' , "),
    ],
)
def test_without_distinct(sql: str, expected: str | None) -> None:
    assert without_distinct(sql) == (sql if expected is None else expected)


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("a > = 1 AND b < = 2 AND c ! = 3", "a >= 1 AND b <= 2 AND c != 3"),
        ("a = '> =' AND b > = 2", "a = '> =' AND b >= 2"),
        ("WHERE YEAR(CURDATE()) - y", "WHERE 2020 - y"),
        ("myyear(curdate())", "myyear(curdate())"),
    ],
)
def test_repaired(sql: str, expected: str) -> None:
    assert repaired(sql) == expected


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("SELECT a FROM t ORDER BY a", True),
        ("SELECT a FROM t\norder\n\tby a", True),
        ("SELECT a FROM t ORDER /* x */ BY a", True),
        ("SELECT a FROM (SELECT a FROM t ORDER BY a)", False),
        ("WITH x AS (SELECT a FROM t ORDER BY a) SELECT a FROM x", False),
        ("WITH x AS (SELECT a FROM t) SELECT a FROM x ORDER BY a", True),
        ("SELECT sum(a) OVER (PARTITION BY b ORDER BY c) FROM t", False),
        ("SELECT ')' FROM (SELECT '(' ORDER BY 1)", False),
        ("SELECT [order by] FROM t", False),
        ("SELECT a FROM t ORDER", False),
        ("", False),
    ],
)
def test_has_top_level_order(sql: str, expected: bool) -> None:
    assert has_top_level_order(sql) is expected


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("SELECT a FROM t", ()),
        ("SELECT a FROM t ORDER BY random() LIMIT 1", ("random",)),
        ("SELECT random FROM t", ()),
        ("SELECT date('now')", ("clock",)),
        ("SELECT a FROM t WHERE y < CURRENT_TIMESTAMP", ("clock",)),
        ("SELECT 'current_timestamp', 'nowhere'", ()),
        ("SELECT a FROM t LIMIT 3", ("limit_without_order",)),
        ("SELECT a FROM t ORDER BY a LIMIT 3", ()),
        ("SELECT a FROM (SELECT a FROM t LIMIT 3) ORDER BY a", ("limit_without_order",)),
        ("SELECT a FROM (SELECT a FROM t ORDER BY a LIMIT 3) LIMIT 2", ("limit_without_order",)),
        ("SELECT a, random() FROM t WHERE b > datetime('NOW') LIMIT 3", ("random", "clock", "limit_without_order")),
    ],
)
def test_unstable(sql: str, expected: tuple[str, ...]) -> None:
    assert unstable(sql) == expected


def test_long_texts_take_linear_time() -> None:
    for piece in ("'", '"', "[", "/*", "(", "distinct ", "a.", "'' ", "- "):
        sql = piece * 100_000
        assert sum(len(token.text) for token in tokens(sql)) == len(sql)
