from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import pytest

from common.data.beir import DataError
from rewarders.servers.hosting import SearchServerError
from rewarders.servers.retrieval import dense_index
from rewarders.servers.retrieval.dense_index import DenseIndex, open_index
from rewarders.servers.retrieval.dense_wire import DenseSettings
from rewarders.servers.retrieval.faiss_index import open_faiss
from rewarders.servers.retrieval.passages import read_passages
from rewarders.servers.retrieval.vectors import read_vectors
from tests.rewarders.dense.tiny_bert import build_tiny_bert, random_texts, reference_vectors, write_corpus

DOCUMENTS = {f"d{number}": text for number, text in enumerate(random_texts(200, seed=3, longest=30))}
QUERIES = random_texts(40, seed=4, longest=8)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), DOCUMENTS)


def _open(corpus: Path, cache: Path, **settings: object) -> DenseIndex:
    return open_index(corpus, DenseSettings(**settings), cache, lambda done, total: None)  # type: ignore[arg-type]


def _search(index: DenseIndex, queries: list[str], k: int) -> list[tuple[list[str], list[float]]]:
    ids = read_passages(index.made.passages).ids
    hits = index.search(queries, [k] * len(queries))
    return [([ids[document] for document in documents], scores.tolist()) for documents, scores in hits]


@pytest.mark.parametrize("normalize", [True, False])
def test_a_flat_index_gives_the_largest_inner_products(
    bert: Path, corpus: Path, tmp_path: Path, normalize: bool
) -> None:
    settings = {"encoder": str(bert), "normalize": normalize, "query_prefix": "query: ", "passage_prefix": "passage: "}
    index = _open(corpus, tmp_path, **settings)
    passages = reference_vectors(bert, ["passage: " + text for text in DOCUMENTS.values()], "mean", normalize)
    queries = reference_vectors(bert, ["query: " + text for text in QUERIES], "mean", normalize)
    names = np.array(list(DOCUMENTS))
    for (ids, scores), expected in zip(_search(index, QUERIES, 10), queries @ passages.T, strict=True):
        best = np.argsort(-expected, kind="stable")
        np.testing.assert_allclose(scores, expected[best[:10]], rtol=1e-4)
        # Where neighbours in the ranking are closer than floats can tell, their order is open.
        gaps = -np.diff(expected[best[:11]])
        clear = [place for place in range(10) if gaps[place] > 1e-4 and (place == 0 or gaps[place - 1] > 1e-4)]
        assert [ids[place] for place in clear] == names[best[clear]].tolist()
        assert len(clear) >= 5


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_the_same_vectors_in_faiss_give_the_same(bert: Path, corpus: Path, tmp_path: Path, kind: str) -> None:
    index = _open(corpus, tmp_path, encoder=str(bert), index=kind)
    vectors = np.array(read_vectors(index.made.vectors))
    if kind == "flat":
        library = faiss.IndexFlatIP(32)
    else:
        library = faiss.IndexHNSWFlat(32, 32, faiss.METRIC_INNER_PRODUCT)
        library.hnsw.efConstruction, library.hnsw.efSearch = 200, 128
    library.add(vectors)
    scores, rows = library.search(index._encoder.encode(QUERIES), 20)
    ids = list(DOCUMENTS)
    for (found, ours), theirs, expected in zip(_search(index, QUERIES, 20), scores, rows, strict=True):
        assert found == [ids[row] for row in expected]
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_hnsw_finds_nearly_what_flat_finds(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    vectors = random.standard_normal((3000, 48)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    np.save(tmp_path / "v.npy", vectors)
    queries = np.ascontiguousarray(vectors[:200] + 0.1 * random.standard_normal((200, 48)).astype(np.float32))
    _, exact = open_faiss(tmp_path / "v.npy", tmp_path / "g.faiss", DenseSettings()).search(queries, 10)
    _, close = open_faiss(tmp_path / "v.npy", tmp_path / "g.faiss", DenseSettings(index="hnsw")).search(queries, 10)
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact, close, strict=True)]) >= 0.95
    narrow = DenseSettings(index="hnsw", hnsw_ef_search=1)
    _, poor = open_faiss(tmp_path / "v.npy", tmp_path / "g.faiss", narrow).search(queries, 1)
    assert (poor[:, 0] == exact[:, 0]).mean() < 1, "efSearch has no effect"


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_batching_does_not_change_rankings(bert: Path, corpus: Path, tmp_path: Path, kind: str) -> None:
    index = _open(corpus, tmp_path, encoder=str(bert), index=kind)
    random = np.random.default_rng(5)
    ks = random.choice([3, 20, 150], len(QUERIES)).tolist()
    together = index.search(QUERIES, ks)
    for i in random.permutation(len(QUERIES)).tolist():
        documents, scores = index.search([QUERIES[i]], [ks[i]])[0]
        assert len(documents) == ks[i]
        np.testing.assert_array_equal(documents, together[i][0])
        np.testing.assert_allclose(scores, together[i][1], rtol=1e-5)


def test_ties_go_by_id_even_at_the_cut(bert: Path, tmp_path: Path) -> None:
    # In the file, equal texts lie far apart and in no order of their ids.
    names = [f"{number}" for number in range(60)]
    np.random.default_rng(6).shuffle(names)
    texts = random_texts(6, seed=7, longest=9)
    corpus = write_corpus(tmp_path / "corpus", {name: texts[place % 6] for place, name in enumerate(names)})
    index = _open(corpus, tmp_path, encoder=str(bert))
    assert index.size == 60
    assert index.made.encoded == 6
    groups = [sorted(name for place, name in enumerate(names) if place % 6 == text) for text in range(6)]
    full = _search(index, QUERIES[:5], 100)
    for (ids, scores), (few, _) in zip(full, _search(index, QUERIES[:5], 13), strict=True):
        assert len(set(ids)) == 60
        assert scores == sorted(scores, reverse=True)
        for start in range(0, 60, 10):
            assert ids[start : start + 10] in groups
        assert few == ids[:13]


def test_a_term_without_meaning_finds_nothing(corpus: Path, tmp_path: Path) -> None:
    index = _open(corpus, tmp_path)
    (nothing, _), (something, _) = _search(index, ["☃ ☃☃", "aspirin for stroke"], 5)
    assert nothing == []
    assert len(something) == 5


def test_more_wanted_than_there_is_gives_all(bert: Path, corpus: Path, tmp_path: Path) -> None:
    [(ids, _)] = _search(_open(corpus, tmp_path, encoder=str(bert)), ["stroke"], 100_000)
    assert sorted(ids) == sorted(DOCUMENTS)


def test_a_second_opening_encodes_nothing(bert: Path, corpus: Path, tmp_path: Path) -> None:
    first = _open(corpus, tmp_path, encoder=str(bert), index="hnsw")
    assert first.made.encoded == len(DOCUMENTS)
    second = _open(corpus, tmp_path, encoder=str(bert), index="hnsw")
    assert second.made.encoded == 0
    assert second.made.version == first.made.version
    assert _search(second, QUERIES, 5) == _search(first, QUERIES, 5)


def test_versions_and_vectors_follow_corpus_encoder_and_settings(bert: Path, corpus: Path, tmp_path: Path) -> None:
    other_corpus = write_corpus(tmp_path / "other", DOCUMENTS | {"d0": "aspirin"})
    other_bert = build_tiny_bert(tmp_path / "bert", seed=1)
    base = _open(corpus, tmp_path, encoder=str(bert)).made
    changed = [
        _open(other_corpus, tmp_path, encoder=str(bert)).made,
        _open(corpus, tmp_path, encoder=str(other_bert)).made,
        _open(corpus, tmp_path, encoder=str(bert), pooling="cls").made,
        _open(corpus, tmp_path, encoder=str(bert), normalize=False).made,
        _open(corpus, tmp_path, encoder=str(bert), passage_prefix="passage: ").made,
        _open(corpus, tmp_path, encoder=str(bert), max_tokens=9).made,
    ]
    assert len({made.vectors for made in [base, *changed]}) == 7
    prefix = _open(corpus, tmp_path, encoder=str(bert), query_prefix="query: ").made
    graph = _open(corpus, tmp_path, encoder=str(bert), index="hnsw").made
    assert {prefix.vectors, graph.vectors} == {base.vectors}
    assert len({made.version for made in [base, prefix, graph, *changed]}) == 9
    threads = _open(corpus, tmp_path, encoder=str(bert), threads=2, batch=7).made
    assert threads.version == base.version


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _foreign(path: Path) -> None:
    path.write_bytes(b"x" * path.stat().st_size)


@pytest.mark.parametrize("damage", [_truncate, _foreign])
@pytest.mark.parametrize("pattern", ["*.npy", "*.faiss", "*.passages", "*.encoder/model.safetensors"])
def test_a_damaged_cache_is_made_again(
    corpus: Path, tmp_path: Path, pattern: str, damage: Callable[[Path], None]
) -> None:
    index = _open(corpus, tmp_path, index="hnsw")
    expected = _search(index, QUERIES, 5)
    [path] = tmp_path.glob(pattern)
    damage(path)
    again = _open(corpus, tmp_path, index="hnsw")
    assert _search(again, QUERIES, 5) == expected
    assert again.made.encoded == (len(DOCUMENTS) if pattern == "*.npy" else 0)
    assert path.read_bytes() != b"x" * path.stat().st_size


def test_text_that_is_not_unicode_and_ids_of_any_kind_are_taken(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    lines = ['{"_id": 17, "text": "aspirin \\ud800 stroke"}', '{"_id": "é", "title": "sleep", "text": ""}']
    (corpus / "corpus.jsonl").write_text("\n".join(lines), encoding="utf-8")
    [(ids, _)] = _search(_open(corpus, tmp_path), ["aspirin"], 5)
    assert set(ids) == {"17", "é"}


@pytest.mark.parametrize(("lines", "expected"), [(None, "cannot be read"), ("", "no documents"), ("{", "not JSON")])
def test_a_corpus_that_cannot_be_used_is_said_in_one_line(tmp_path: Path, lines: str | None, expected: str) -> None:
    if lines is not None:
        (tmp_path / "corpus.jsonl").write_text(lines)
    with pytest.raises(DataError, match=expected) as raised:
        _open(tmp_path, tmp_path / "cache")
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(hasattr(faiss, "StandardGpuResources"), reason="this faiss can use a GPU")
def test_gpu_without_faiss_gpu_is_said_in_one_line(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(SearchServerError, match=r"faiss-gpu.*gpu=false") as raised:
        _open(corpus, tmp_path, gpu=True)
    assert "\n" not in str(raised.value)


def test_hnsw_on_a_gpu_is_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(SearchServerError, match="CPU only"):
        _open(corpus, tmp_path, gpu=True, index="hnsw")


def test_an_open_tie_is_searched_for_once_more(bert: Path, corpus: Path, tmp_path: Path) -> None:
    """Every passage has the same vector: the answer to any k is the first ids, whatever faiss would pick."""
    index = _open(corpus, tmp_path, encoder=str(bert))
    faiss_index = faiss.IndexFlatIP(32)
    faiss_index.add(np.tile(index._encoder.encode(["aspirin"]), (len(DOCUMENTS), 1)))
    index._index._index = faiss_index
    [(ids, _)] = _search(index, ["stroke"], 7)
    assert ids == sorted(DOCUMENTS)[:7]
    assert len(DOCUMENTS) < dense_index._MOST_TIED
