"""Searches a corpus with PubMed queries: SQLite FTS5 finds the documents of a term, sets do the rest.

A set of documents is an int whose bit `rank` stands for the document of that rank; rank 1 is the newest. So
Boolean operators are single operations on ints, a range of dates is a run of bits, and results by date are
the lowest bits. FTS5's own AND/OR/NOT are not used: phrases that fall apart and unknown terms that are
dropped depend on what the corpus holds, and the sets of terms can be kept, as the queries of a training run
share most of their words.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from rewarders.servers.dates import date_range
from rewarders.servers.index_cache import Progress, opened_index
from rewarders.servers.pubmed.build import ensure_index
from rewarders.servers.pubmed.fields import ALL_FIELDS, PUBLICATION_DATE, Field
from rewarders.servers.pubmed.query import ParsedQuery, parse
from rewarders.servers.pubmed.syntax import (
    DateRange,
    DocumentId,
    Everything,
    Group,
    Ignored,
    Node,
    Operator,
    Term,
    Unindexed,
    translation,
)
from rewarders.servers.text import STOPWORDS, search_words

Sort = Literal["pub_date", "relevance"]

_MATCHING = "SELECT rowid FROM words WHERE words MATCH ?"
_BEST_FIRST = f"{_MATCHING} ORDER BY bm25(words), rowid"

CACHE_BYTES = 256 << 20
# Cached sets of small corpora would otherwise be counted by the hundred thousand.
MAX_CACHED_TERMS = 50_000


@dataclass(frozen=True, slots=True)
class SearchResult:
    """What a query found.

    `count` counts all documents found, `ids` are those asked for by `retstart` and `retmax`. `translation` is
    the query as it was searched; the other fields are the tokens that esearch reports in its error and
    warning lists.
    """

    count: int
    ids: tuple[str, ...]
    translation: str
    phrases_not_found: tuple[str, ...] = ()
    fields_not_found: tuple[str, ...] = ()
    phrases_ignored: tuple[str, ...] = ()
    quoted_phrases_not_found: tuple[str, ...] = ()


@dataclass(slots=True)
class _Resolution:
    """What came up while a query was matched with the words of the corpus."""

    phrases_not_found: list[str] = field(default_factory=list)
    quoted_phrases_not_found: list[str] = field(default_factory=list)


class Index:
    """A searchable corpus. Searches may run in several threads; they take turns in SQLite.

    Args:
        path: an index file made by `build.ensure_index`.

    Raises:
        DataError: the file is no such index.
    """

    def __init__(self, path: Path) -> None:
        with opened_index(path) as self._connection:
            rows = self._connection.execute("SELECT id, pub_date FROM documents ORDER BY rank").fetchall()
        self._lock = threading.Lock()
        self._ids = [document_id for document_id, _ in rows]
        self._rank_of_id = {document_id: rank for rank, document_id in enumerate(self._ids, start=1)}
        # Ascending, for bisection: ranks run from the newest document to the oldest.
        self._days = [day for _, day in reversed(rows)]
        self._everything = _run_of_bits(1, len(rows) + 1)
        cached_terms = min(MAX_CACHED_TERMS, CACHE_BYTES // (len(rows) // 8 + 1))
        self._documents_of = lru_cache(maxsize=cached_terms)(self._look_up)

    @classmethod
    def of_corpus(
        cls, corpus: str | Path, cache_folder: str | Path | None = None, progress: Progress | None = None
    ) -> Index:
        """Open the index of a BEIR folder; the first time, build it (and call `progress(done, total)`).

        Raises:
            DataError: the corpus is missing or has a broken line, or the index cannot be written.
        """
        return cls(ensure_index(Path(corpus), Path(cache_folder) if cache_folder else None, progress))

    def __len__(self) -> int:
        return len(self._ids)

    def close(self) -> None:
        self._connection.close()

    def search(
        self,
        query: str | ParsedQuery,
        retmax: int = 20,
        retstart: int = 0,
        sort: Sort = "pub_date",
        mindate: str | None = None,
        maxdate: str | None = None,
    ) -> SearchResult:
        """Search by a PubMed query.

        Args:
            query: the query's text, or the text already parsed.
            retmax: most ids returned; `count` is not bounded by it.
            retstart: results passed over before the first id returned.
            sort: `pub_date` (newest first) or `relevance` (BM25 of the query's terms; not PubMed's Best
                Match).
            mindate, maxdate: first and last publication date (YYYY, YYYY/MM or YYYY/MM/DD), each open if
                None.

        Raises:
            QuerySyntaxError: PubMed would refuse the query.
            ValueError: a date is malformed.
        """
        parsed = parse(query) if isinstance(query, str) else query
        notes = _Resolution()
        resolved = self._resolve(parsed.root, notes) if parsed.root else None
        found = self._evaluate(resolved) if resolved else 0
        searched = resolved or parsed.root
        if (mindate or maxdate) and searched:
            dates = _date_node(mindate, maxdate)
            found &= self._between(dates)
            searched = Group(searched, ((Operator.AND, dates),))
        stop = retstart + retmax
        ranks = self._by_relevance(resolved, found, stop) if sort == "relevance" else _lowest_bits(found, stop)
        return SearchResult(
            count=found.bit_count(),
            ids=tuple(self._ids[rank - 1] for rank in ranks[retstart:stop]),
            translation=translation(searched) if searched else "",
            phrases_not_found=tuple(dict.fromkeys(notes.phrases_not_found)),
            fields_not_found=parsed.unknown_tags,
            phrases_ignored=parsed.ignored,
            quoted_phrases_not_found=tuple(dict.fromkeys(notes.quoted_phrases_not_found)),
        )

    def document_frequency(self, word: str) -> int:
        """How many documents hold a word in title or abstract (adjacent words, if it is several)."""
        words = tuple(search_words(word))
        return self._documents_of(words, ALL_FIELDS, False).bit_count() if words else 0

    # A query is first matched with the corpus: what cannot be found falls apart or is dropped, as in PubMed.

    def _resolve(self, node: Node, notes: _Resolution) -> Node | None:
        """The tree that is searched, or None if nothing of it is left."""
        if isinstance(node, Group):
            return self._resolve_group(node, notes)
        if isinstance(node, Ignored):
            return None
        if isinstance(node, Unindexed):
            notes.phrases_not_found.append(f"{node.text}[{node.field.label}]")
        return self._resolve_term(node, notes) if isinstance(node, Term) else node

    def _resolve_group(self, group: Group, notes: _Resolution) -> Node | None:
        kept: list[tuple[Operator, Node]] = []
        for operator, node in ((Operator.AND, group.first), *group.rest):
            resolved = self._resolve(node, notes)
            if not kept and resolved is not None and operator is Operator.NOT:
                # What NOT takes documents from has been dropped: it found none, so none are left.
                kept.append((Operator.AND, group.first))
            if resolved is not None:
                kept.append((operator, resolved))
        if not kept:
            return None
        return Group(kept[0][1], tuple(kept[1:])) if len(kept) > 1 else kept[0][1]

    def _resolve_term(self, term: Term, notes: _Resolution) -> Node | None:
        if self._documents_of(term.words, term.field, term.prefix):
            return term
        if term.quoted and len(term.words) > 1:
            notes.quoted_phrases_not_found.append(f'"{term.text}"')
        elif not term.splits:
            notes.phrases_not_found.append(term.text)
        if not term.splits:
            return None if term.droppable else term
        words = _single_words(term)
        if not words:
            return None
        return self._resolve_group(Group(words[0], tuple((Operator.AND, word) for word in words[1:])), notes)

    # The resolved tree is evaluated on sets of documents.

    def _evaluate(self, node: Node) -> int:
        match node:
            case Group():
                return self._evaluate_group(node)
            case Term():
                return self._documents_of(node.words, node.field, node.prefix)
            case DateRange():
                return self._between(node)
            case DocumentId():
                return 1 << self._rank_of_id[node.id] if node.id in self._rank_of_id else 0
            case Everything():
                return self._everything
            case Unindexed() | Ignored():
                return 0

    def _evaluate_group(self, group: Group) -> int:
        found = self._evaluate(group.first)
        for operator, node in group.rest:
            operand = self._evaluate(node)
            if operator is Operator.AND:
                found &= operand
            elif operator is Operator.OR:
                found |= operand
            else:
                found &= ~operand
        return found

    def _between(self, dates: DateRange) -> int:
        total = len(self._days)
        oldest = total - bisect_left(self._days, dates.first)
        newest = total - bisect_right(self._days, dates.last)
        return _run_of_bits(newest + 1, oldest + 1)

    def _look_up(self, words: tuple[str, ...], search_field: Field, prefix: bool) -> int:
        """The documents in which the words are adjacent within one column of the field."""
        expression = _match_expression(words, search_field, prefix)
        with self._lock:
            rows = self._connection.execute(_MATCHING, (expression,)).fetchall()
        if not rows:
            return 0
        flags = np.zeros(len(self._ids) + 1, dtype=np.uint8)
        flags[np.fromiter((rank for (rank,) in rows), dtype=np.int64, count=len(rows))] = 1
        return int.from_bytes(np.packbits(flags, bitorder="little").tobytes(), "little")

    def _by_relevance(self, resolved: Node | None, found: int, stop: int) -> list[int]:
        """Ranks of the best `stop` documents found: by BM25, then those without any of the terms, by date."""
        terms = dict.fromkeys(
            _match_expression(term.words, term.field, term.prefix) for term in _positive_terms(resolved)
        )
        ranks: list[int] = []
        if terms and found:
            expression = " OR ".join(f"({term})" for term in terms)
            with self._lock:
                scored = self._connection.execute(_BEST_FIRST, (expression,)).fetchall()
            flags = _flags(found, len(self._ids) + 1)
            ranks = [rank for (rank,) in scored if flags[rank]][:stop]
        if len(ranks) < stop:
            already = set(ranks)
            ranks += [rank for rank in _lowest_bits(found, stop) if rank not in already]
        return ranks[:stop]


def _single_words(term: Term) -> list[Term]:
    """The words of a phrase as single terms; an untagged phrase loses its stopwords, as untagged words do.

    Nothing is left of an untagged phrase of stopwords alone.
    """
    last = len(term.words) - 1
    return [
        Term((word,), term.field, word, prefix=term.prefix and position == last, droppable=term.droppable)
        for position, word in enumerate(term.words)
        if not (term.droppable and word in STOPWORDS)
    ]


def _positive_terms(node: Node | None) -> list[Term]:
    """The terms that a document is found by: all but those on the right of NOT."""
    if isinstance(node, Term):
        return [node]
    if not isinstance(node, Group):
        return []
    wanted = [node.first, *(operand for operator, operand in node.rest if operator is not Operator.NOT)]
    return [term for operand in wanted for term in _positive_terms(operand)]


def _match_expression(words: tuple[str, ...], search_field: Field, prefix: bool) -> str:
    """An FTS5 expression. Words hold letters and digits only, so quotes are all the escaping it needs."""
    star = " *" if prefix else ""
    return f'{{{" ".join(search_field.columns)}}} : "{" ".join(words)}"{star}'


def _date_node(mindate: str | None, maxdate: str | None) -> DateRange:
    first, last = date_range(mindate or "0001"), date_range(maxdate or "9999")
    if first is None or last is None:
        wrong = mindate if first is None else maxdate
        raise ValueError(f"{wrong!r} is no date: write YYYY, YYYY/MM or YYYY/MM/DD")
    return DateRange(first[0], last[1], PUBLICATION_DATE)


def _run_of_bits(first: int, stop: int) -> int:
    """An int with bits first to stop - 1 set; 0 if there are none."""
    return (1 << stop) - (1 << first) if stop > first else 0


def _flags(value: int, size: int) -> npt.NDArray[np.uint8]:
    """The lowest `size` bits of an int, one array element each."""
    octets = np.frombuffer(value.to_bytes(max(size, value.bit_length()) // 8 + 1, "little"), dtype=np.uint8)
    return np.unpackbits(octets, count=size, bitorder="little")


def _lowest_bits(value: int, limit: int) -> list[int]:
    """Positions of the lowest `limit` set bits, ascending."""
    positions: list[int] = np.flatnonzero(_flags(value, value.bit_length()))[: max(limit, 0)].tolist()
    return positions
