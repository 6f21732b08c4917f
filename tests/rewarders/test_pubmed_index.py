"""The index against a brute-force evaluator, and how it is built and cached."""

from __future__ import annotations

import json
import os
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.data.beir import DataError, read_corpus, read_split
from rewarders.servers.dates import date_range, made_up_date
from rewarders.servers.pubmed import Index, QuerySyntaxError
from tests.rewarders.pubmed_oracle import Oracle, OracleDocument, Query, text_of

VOCABULARY = ("heart", "hearts", "heartburn", "lung", "attack", "aspirin", "rate", "the", "of")
UNKNOWN = ("zebra", "quux")
DOCUMENTS = 40


def write_corpus(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def random_rows(seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)

    def text(longest: int) -> str:
        return " ".join(rng.choices(VOCABULARY, weights=(3, 1, 1, 3, 3, 2, 1, 4, 4), k=rng.randint(1, longest)))

    return [
        {
            "_id": f"doc-{number}",
            "title": text(4),
            "text": text(8),
            "metadata": {"pub_date": f"{rng.randint(2000, 2004)}/{rng.randint(1, 12):02d}/15"},
        }
        for number in range(DOCUMENTS)
    ]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Index, Oracle]:
    folder = tmp_path_factory.mktemp("pubmed")
    rows = random_rows(seed=7)
    index = Index.of_corpus(write_corpus(folder / "corpus", rows), folder / "cache")
    documents = [
        OracleDocument(r["_id"], r["title"], r["text"], int(r["metadata"]["pub_date"].replace("/", ""))) for r in rows
    ]
    return index, Oracle(documents)


_word = st.sampled_from([*VOCABULARY, *UNKNOWN])
_words = st.lists(_word, min_size=1, max_size=3).map(tuple)
_tag = st.sampled_from(["ti", "tiab", "Title", "Title/Abstract"])
_day = st.builds(lambda y, m, d: y * 10000 + m * 100 + d, st.integers(1999, 2005), st.integers(1, 12), st.just(15))
_PREFIXES = (
    ("hear",),
    ("hearts",),
    ("lung", "hear"),
    ("zebr",),
    ("heart", "zebra", "lung"),
    ("rate", "of", "quux"),
)
_leaf = st.one_of(
    _word.map(lambda word: ("word", word)),
    st.lists(_word, min_size=2, max_size=3).map(lambda words: ("run", tuple(words))),
    st.tuples(st.just("phrase"), _words, st.none() | _tag, st.just(False)),
    st.tuples(st.just("phrase"), st.sampled_from(_PREFIXES), st.none() | _tag, st.just(True)),
    st.tuples(st.just("tagged"), _words, _tag),
    st.tuples(st.just("dates"), _day, _day),
)
_operator = st.sampled_from(["AND", "OR", "NOT"])


def _chains(operands: st.SearchStrategy[Query]) -> st.SearchStrategy[Query]:
    rest = st.lists(st.tuples(_operator, operands), min_size=1, max_size=4).map(tuple)
    return st.tuples(st.just("chain"), operands, rest)


_queries = st.recursive(_leaf, _chains, max_leaves=10)


_patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@settings(_patient, max_examples=400)
@given(query=_queries, retstart=st.integers(0, 5), retmax=st.integers(0, 50))
def test_index_equals_brute_force(world: tuple[Index, Oracle], query: Query, retstart: int, retmax: int) -> None:
    index, oracle = world
    expected = oracle.ids_by_date(query)
    result = index.search(text_of(query), retmax=retmax, retstart=retstart)
    assert result.count == len(expected)
    assert list(result.ids) == expected[retstart : retstart + retmax]


@settings(_patient, max_examples=200)
@given(query=_queries, first=_day, last=_day)
def test_date_bounds_filter_and_the_translation_finds_the_same(
    world: tuple[Index, Oracle], query: Query, first: int, last: int
) -> None:
    index, oracle = world
    days = {document.id: document.day for document in oracle.documents}
    expected = [i for i in oracle.ids_by_date(query) if first <= days[i] <= last]
    mindate, maxdate = (f"{day // 10000}/{day // 100 % 100}/{day % 100}" for day in (first, last))
    result = index.search(text_of(query), retmax=DOCUMENTS, mindate=mindate, maxdate=maxdate)
    assert list(result.ids) == expected
    if result.ids:
        assert index.search(result.translation, retmax=DOCUMENTS).ids == result.ids


@settings(_patient, max_examples=100)
@given(query=_queries)
def test_relevance_reorders_the_same_documents(world: tuple[Index, Oracle], query: Query) -> None:
    index, _ = world
    by_date = index.search(text_of(query), retmax=DOCUMENTS)
    by_relevance = index.search(text_of(query), retmax=DOCUMENTS, sort="relevance")
    assert len(by_relevance.ids) == by_date.count
    assert set(by_relevance.ids) == set(by_date.ids)
    assert index.search(text_of(query), retmax=3, sort="relevance").ids == by_relevance.ids[:3]


@settings(_patient, max_examples=300)
@given(text=st.text(max_size=40) | st.text(st.sampled_from('ab*"()[]:-~^{}+.,\x00\ud800𫝀′ AND'), max_size=40))
def test_no_text_breaks_the_search(world: tuple[Index, Oracle], text: str) -> None:
    try:
        result = world[0].search(text, sort="relevance")
    except QuerySyntaxError:
        return
    assert len(result.ids) == min(result.count, 20)
    json.dumps(result.translation, ensure_ascii=False).encode()


def test_relevance_is_bm25(world: tuple[Index, Oracle]) -> None:
    index, oracle = world
    words = ["heart", "aspirin", "rate"]
    scores = oracle.bm25(words)
    ids = index.search(" OR ".join(words), retmax=DOCUMENTS, sort="relevance").ids
    assert len(ids) > 10
    assert all(scores[better] >= scores[worse] - 1e-9 for better, worse in pairwise(ids))
    assert scores[ids[0]] > scores[ids[-1]]


def test_unknown_terms_are_dropped_and_reported(world: tuple[Index, Oracle]) -> None:
    index, _ = world
    with_unknown = index.search("zebra AND heart")
    assert with_unknown.count == index.search("heart").count > 0
    assert with_unknown.phrases_not_found == ("zebra",)
    assert with_unknown.translation == '"heart"[All Fields]'
    assert index.search("zebra[ti] AND heart").count == 0
    assert index.search("zebra-fish AND heart").count == 0
    assert index.search("zebra quux").count == 0
    dotted = index.search("heart.zebra attack")
    assert dotted.count == index.search("attack").count > 0
    assert dotted.phrases_not_found == ("heart.zebra",)


def test_phrases_that_do_not_occur_fall_apart(world: tuple[Index, Oracle]) -> None:
    index, _ = world
    result = index.search('"heartburn zebra lung"')
    assert result.quoted_phrases_not_found == ('"heartburn zebra lung"',)
    assert result.count == index.search("heartburn AND lung").count


def test_an_unknown_phrase_of_stopwords_is_dropped(world: tuple[Index, Oracle]) -> None:
    index, _ = world
    alone = index.search("heart", retmax=DOCUMENTS)
    assert alone.count > 0
    assert index.search('"the the the" AND heart', retmax=DOCUMENTS).ids == alone.ids
    assert index.search('"the the the"', retmax=DOCUMENTS).count == 0


def test_ids_and_absent_fields(world: tuple[Index, Oracle]) -> None:
    index, _ = world
    assert index.search("doc-3[uid] OR doc-5[pmid] OR 99[uid]").count == 2
    assert index.search("smith[au] OR doc-3[uid]").phrases_not_found == ("smith[Author]",)
    assert index.search("all[sb]").count == DOCUMENTS


def test_document_frequency(world: tuple[Index, Oracle]) -> None:
    index, oracle = world
    assert index.document_frequency("Aspirin") == len(oracle.matching(("aspirin",), None, False)) > 0
    assert index.document_frequency("zebra") == 0
    assert index.document_frequency("?") == 0


def test_bad_queries_and_dates_are_refused(world: tuple[Index, Oracle]) -> None:
    index, _ = world
    with pytest.raises(QuerySyntaxError):
        index.search("(heart")
    with pytest.raises(ValueError, match="'soon' is no date"):
        index.search("heart", maxdate="soon")


def test_in_a_corpus_without_dates_the_last_document_is_the_newest(tmp_path: Path) -> None:
    rows = [{"_id": f"d{number}", "title": "", "text": "same text"} for number in range(30)]
    index = Index.of_corpus(write_corpus(tmp_path / "c", rows), tmp_path / "cache")
    assert index.search("same", retmax=30).ids == tuple(f"d{number}" for number in reversed(range(30)))
    assert index.search("same[ti]").count == 0


def test_newer_comes_first_and_of_one_day_the_later_in_the_corpus(tmp_path: Path) -> None:
    dates = ["2001/05", "2003", "2001/05/01", "2003/01/02"]
    rows = [{"_id": d, "title": "x1", "text": "", "metadata": {"pub_date": d}} for d in dates]
    index = Index.of_corpus(write_corpus(tmp_path / "c", rows), tmp_path / "cache")
    assert index.search("x1").ids == ("2003/01/02", "2003", "2001/05/01", "2001/05")


def test_the_index_is_built_once_per_content(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    corpus, cache = write_corpus(tmp_path / "c", random_rows(1)), tmp_path / "cache"
    Index.of_corpus(corpus, cache, lambda done, total: calls.append((done, total)))
    assert calls[0] == (0, DOCUMENTS)
    assert calls[-1] == (DOCUMENTS, DOCUMENTS)
    calls.clear()
    Index.of_corpus(corpus, cache, lambda done, total: calls.append((done, total)))
    assert calls == []
    write_corpus(corpus, random_rows(2))
    Index.of_corpus(corpus, cache, lambda done, total: calls.append((done, total)))
    assert calls
    assert len(list(cache.iterdir())) == 2


def test_an_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    corpus, cache = write_corpus(tmp_path / "c", random_rows(1)), tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        Index.of_corpus(corpus, cache, interrupt)
    assert list(cache.iterdir()) == []
    assert len(Index.of_corpus(corpus, cache)) == DOCUMENTS


def test_unusable_input_is_one_clear_line(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(DataError, match=r"corpus\.jsonl cannot be read \(No such file"):
        Index.of_corpus(tmp_path / "nowhere", cache)
    broken = write_corpus(tmp_path / "broken", random_rows(1))
    with (broken / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "x", "title"\n')
    with pytest.raises(DataError, match=f"line {DOCUMENTS + 1}"):
        Index.of_corpus(broken, cache)
    rows = [{"_id": "d", "title": "", "text": "", "metadata": {"pub_date": "spring"}}]
    with pytest.raises(DataError, match="'spring' is no date"):
        Index.of_corpus(write_corpus(tmp_path / "spring", rows), cache)
    assert list(cache.iterdir()) == []


def test_a_damaged_index_file_is_named(tmp_path: Path) -> None:
    corpus, cache = write_corpus(tmp_path / "c", random_rows(1)), tmp_path / "cache"
    Index.of_corpus(corpus, cache).close()
    (file,) = cache.iterdir()
    file.write_bytes(b"not a database" * 100)
    with pytest.raises(DataError, match="remove the file"):
        Index.of_corpus(corpus, cache)


def test_a_cache_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c", random_rows(1))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write the search index"):
        Index.of_corpus(corpus, tmp_path / "file" / "cache")


@given(total=st.integers(1, 100_000), data=st.data())
def test_made_up_dates_are_dates_and_never_fall(total: int, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, total - 1))
    day = made_up_date(position, total)
    assert date_range(f"{day // 10000}/{day // 100 % 100}/{day % 100}") == (day, day)
    assert made_up_date(min(position + 1, total - 1), total) >= day


@pytest.mark.skipif("DEEPRETRIEVAL_DATA" not in os.environ, reason="needs DEEPRETRIEVAL_DATA")
def test_scifact_baselines_are_those_measured_on_plain_fts5(tmp_path: Path) -> None:
    """Recall at 50 by date: AND of all words 0.018, of the k rarest known words 0.545, 0.356, 0.211."""
    folder = Path(os.environ["DEEPRETRIEVAL_DATA"]) / "scifact"
    index = Index.of_corpus(folder, tmp_path / "cache")
    assert len(index) == sum(1 for _ in read_corpus(folder))

    def recall(rarest: int | None) -> float:
        found = 0.0
        for row in (rows := read_split(folder, "test")):
            words = list(dict.fromkeys(word.strip(".,()") for word in row.text.split()))
            known = sorted((w for w in words if index.document_frequency(w)), key=index.document_frequency)
            chosen = words if rarest is None else known[:rarest]
            ids = index.search(" AND ".join(f'"{word}"[tiab]' for word in chosen), retmax=50).ids
            found += len(set(ids) & set(row.relevant)) / len(row.relevant)
        return found / len(rows)

    measured = [recall(rarest) for rarest in (None, 1, 2, 3)]
    assert measured == pytest.approx([0.018, 0.545, 0.356, 0.211], abs=0.03)
