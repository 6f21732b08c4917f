"""Searches study records with Essie queries: SQLite FTS5 finds the records of a phrase, arrays of flags do the rest.

A set of records is an array with one flag for each record, by rank (rank 1, the record first posted last, has index 0).
The sets of phrases are kept, because the queries of a training run share most of their words. They must not be changed.
"""

from __future__ import annotations

import json
import threading
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rewarders.servers.ctgov.areas import FIELDS, RELEVANCE_WEIGHTS, Area, Field
from rewarders.servers.ctgov.build import VALUE_END, VALUE_START, ensure_index
from rewarders.servers.ctgov.syntax import (
    And,
    Coverage,
    Everything,
    Missing,
    Node,
    Not,
    Or,
    Range,
    Term,
    positive_terms,
)
from rewarders.servers.index_cache import Progress, opened_index

Flags = npt.NDArray[np.bool_]

CACHE_BYTES = 256 << 20
# Cached sets of small collections would otherwise be counted by the hundred thousand.
MAX_CACHED_PHRASES = 50_000

_MATCHING = "SELECT rowid FROM words WHERE words MATCH ?"
_WEIGHTS = ", ".join(map(str, RELEVANCE_WEIGHTS))
_BEST_FIRST = f"{_MATCHING} ORDER BY bm25(words, {_WEIGHTS}), rowid"
RELEVANCE = "@relevance"


@dataclass(frozen=True, slots=True)
class SortKey:
    """field: `@relevance` or the name of a date, number or age field. descending: largest or best first."""

    field: str
    descending: bool


@dataclass(frozen=True, slots=True)
class Search:
    """What a record has to satisfy, and in which order records are wanted.

    queries, filters: all of both must hold; only queries count for relevance. ids: the records must be among these,
    None for any. sort: without keys the last posted come first (the order of the real service is then undefined).
    """

    queries: tuple[Node, ...] = ()
    filters: tuple[Node, ...] = ()
    ids: tuple[str, ...] | None = None
    sort: tuple[SortKey, ...] = ()


class Index:
    """A searchable collection of study records. Searches may run in several threads; they take turns in SQLite.

    Args:
        path: an index file made by `build.ensure_index`.

    Raises:
        DataError: the file is no such index.
    """

    def __init__(self, path: Path) -> None:
        with opened_index(path) as self._connection:
            rows = self._connection.execute("SELECT id FROM records ORDER BY rank").fetchall()
            facts = dict(self._connection.execute("SELECT name, value FROM facts").fetchall())
        self._lock = threading.Lock()
        self._ids = [trial for (trial,) in rows]
        self._place_of = {trial: place for place, trial in enumerate(self._ids)}
        self.data_timestamp: str = facts["data_timestamp"]
        cached = min(MAX_CACHED_PHRASES, CACHE_BYTES // (len(rows) + 1) + 1)
        self._records_with = lru_cache(maxsize=cached)(self._look_up)

    @classmethod
    def of_corpus(
        cls, corpus: str | Path, cache_folder: str | Path | None = None, progress: Progress | None = None
    ) -> Index:
        """Open the index of a folder; the first time, build it (and call `progress(done, total)`).

        Raises:
            DataError: the records are missing or broken, or the index cannot be written.
        """
        return cls(ensure_index(Path(corpus), Path(cache_folder) if cache_folder else None, progress))

    def __len__(self) -> int:
        return len(self._ids)

    def close(self) -> None:
        self._connection.close()

    def search(self, search: Search, start: int = 0, limit: int = 1000) -> tuple[int, list[str]]:
        """How many records are found, and the ids of at most `limit` of them, from place `start` on."""
        found = self._evaluate_all((*search.queries, *search.filters))
        if search.ids is not None:
            found = found & self._among(search.ids)
        places = np.flatnonzero(found)
        ordered = self._sorted(places, search)
        return len(places), [self._ids[place] for place in ordered[start : start + limit]]

    def record(self, trial: str) -> Any:
        """The record with this id, as it was in the folder."""
        with self._lock:
            row = self._connection.execute("SELECT record FROM records WHERE id = ?", (trial,)).fetchone()
        return json.loads(zlib.decompress(row[0]))

    # A query is evaluated on sets of records.

    def _evaluate_all(self, nodes: Iterable[Node]) -> Flags:
        found = np.ones(len(self._ids), dtype=np.bool_)
        for node in nodes:
            found &= self._evaluate(node)
        return found

    def _evaluate(self, node: Node) -> Flags:
        match node:
            case Term():
                return self._with_term(node)
            case And():
                return self._evaluate_all(node.operands)
            case Or():
                return self._any_of(self._evaluate(operand) for operand in node.operands)
            case Not():
                return ~self._evaluate(node.operand)
            case Range():
                return self._between(node.field, node.low, node.high)
            case Missing():
                return ~self._any_of(self._with_value(field) for field in node.area.fields)
            case Everything():
                return np.ones(len(self._ids), dtype=np.bool_)

    def _any_of(self, sets: Iterable[Flags]) -> Flags:
        found = np.zeros(len(self._ids), dtype=np.bool_)
        for flags in sets:
            found |= flags
        return found

    def _with_term(self, term: Term) -> Flags:
        sets = [self._records_with(expression) for expression in _match_expressions(term)]
        if term.any_phrase or not sets:
            return self._any_of(sets)
        found = sets[0].copy()
        for flags in sets[1:]:
            found &= flags
        return found

    def _with_value(self, field: Field) -> Flags:
        if field.is_text:
            return self._records_with(_expression(Area(field.name, (field,)), VALUE_START))
        return self._between(field, float("-inf"), float("inf"))

    def _between(self, field: Field, low: float, high: float) -> Flags:
        rows = self._rows("SELECT rank FROM numbers WHERE field = ? AND low BETWEEN ? AND ?", (field.name, low, high))
        return self._flags(rows)

    def _among(self, ids: tuple[str, ...]) -> Flags:
        """The records with one of these ids, or with one as an alias."""
        aliases = Area("", (FIELDS["NCTIdAlias"],))
        found = self._any_of(self._records_with(_expression(aliases, trial.lower())) for trial in ids)
        found[[self._place_of[trial] for trial in ids if trial in self._place_of]] = True
        return found

    def _look_up(self, expression: str) -> Flags:
        return self._flags(self._rows(_MATCHING, (expression,)))

    def _rows(self, statement: str, arguments: tuple[object, ...]) -> list[tuple[int]]:
        with self._lock:
            return self._connection.execute(statement, arguments).fetchall()

    def _flags(self, rows: Sequence[tuple[int]]) -> Flags:
        flags = np.zeros(len(self._ids), dtype=np.bool_)
        flags[np.fromiter((rank - 1 for (rank,) in rows), dtype=np.int64, count=len(rows))] = True
        return flags

    # Order.

    def _sorted(self, places: npt.NDArray[np.int64], search: Search) -> list[int]:
        """Places in the order asked for; of equals the last posted comes first."""
        columns: list[npt.NDArray[Any]] = [places]
        for key in reversed(search.sort):
            by_key = self._relevance(search.queries) if key.field == RELEVANCE else self._values(FIELDS[key.field])
            column = by_key[places]
            # What is missing is NaN, which numpy sorts last whatever the sign.
            columns.append(-column if key.descending else column)
        ordered: list[int] = places[np.lexsort(columns)].tolist()
        return ordered

    def _relevance(self, queries: tuple[Node, ...]) -> npt.NDArray[np.float64]:
        """Scores by place: higher is better, all that no term finds share the lowest."""
        scores = np.zeros(len(self._ids))
        terms = [term for query in queries for term in positive_terms(query)]
        expressions = dict.fromkeys(f"({phrase})" for term in terms for phrase in _match_expressions(term))
        if expressions:
            rows = self._rows(_BEST_FIRST, (" OR ".join(expressions),))
            best = np.fromiter((rank - 1 for (rank,) in rows), dtype=np.int64, count=len(rows))
            scores[best] = np.arange(len(rows), 0, -1)
        return scores

    def _values(self, field: Field) -> npt.NDArray[np.float64]:
        """The field's number of every place, NaN where there is none."""
        with self._lock:
            rows = self._connection.execute("SELECT rank, low FROM numbers WHERE field = ?", (field.name,)).fetchall()
        values = np.full(len(self._ids), np.nan)
        for rank, value in rows:
            values[rank - 1] = value
        return values


def _match_expressions(term: Term) -> list[str]:
    """One FTS5 expression for each phrase of the term."""
    before = f"{VALUE_START} " if term.coverage in (Coverage.FULL_MATCH, Coverage.STARTS_WITH) else ""
    after = f" {VALUE_END}" if term.coverage in (Coverage.FULL_MATCH, Coverage.ENDS_WITH) else ""
    return [_expression(term.area, f"{before}{' '.join(phrase)}{after}") for phrase in term.phrases]


def _expression(area: Area, phrase: str) -> str:
    """Words and marks hold nothing that FTS5 would read as syntax, so quotes are all the escaping they need."""
    return f'{{{" ".join(area.columns)}}} : "{phrase}"'
