"""A dense index as one object: encoder, vectors, faiss. It blocks; `dense_worker` gives it a process of its own."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import faiss
import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from common.data.beir import CORPUS_FILE
from rewarders.servers.hosting import SearchServerError
from rewarders.servers.index_cache import Progress, content_digest
from rewarders.servers.retrieval import corpus_encoder
from rewarders.servers.retrieval.dense_wire import DenseSettings
from rewarders.servers.retrieval.encoder import Encoder
from rewarders.servers.retrieval.encoder_files import encoder_folder, encoder_identity
from rewarders.servers.retrieval.encoder_modules import with_folders_own
from rewarders.servers.retrieval.faiss_index import FaissIndex, check_settings, open_faiss
from rewarders.servers.retrieval.passages import Passages, distinct_texts, ensure_passages
from rewarders.servers.retrieval.sealed import locked
from rewarders.servers.retrieval.vectors import ensure_vectors

# Part of every name in the cache: what other code wrote is never opened.
FORMAT: Final = 1
# Rows beyond the wanted ones that are looked at to break a tie by id.
_MOST_TIED: Final = 4096

Hits = tuple[NDArray[np.int32], NDArray[np.float32]]
"""Numbers of documents (`Passages.ids`) and their scores."""

_NOTHING: Final[Hits] = (np.empty(0, np.int32), np.empty(0, np.float32))


class Made(msgspec.Struct, frozen=True):
    """What opening an index found or made. encoder: its folder. passages: file of documents and their rows. vectors:
    file with one per row. encoded: passages that had to be encoded for it.
    """

    version: str
    encoder: Path
    passages: Path
    vectors: Path
    encoded: int


class DenseIndex:
    """Searches a corpus by the inner product of vectors. version: of corpus and settings."""

    def __init__(
        self, encoder: Encoder, index: FaissIndex, passages: Passages, settings: DenseSettings, made: Made
    ) -> None:
        self.made = made
        self._encoder = encoder
        self._index = index
        self._prefix = settings.query_prefix
        number_of, row_of = passages.number_of(), passages.row_of()
        # Documents of row r: documents[starts[r]:starts[r + 1]], as in a CSR matrix.
        order = np.argsort(row_of, kind="stable")
        self._documents = number_of[order]
        self._starts = np.searchsorted(row_of[order], np.arange(index.rows + 1))
        self._shared = len(order) != index.rows

    @property
    def size(self) -> int:
        """Documents."""
        return len(self._documents)

    def search(self, terms: Sequence[str], ks: Sequence[int]) -> list[Hits]:
        """The ks[i] documents nearest to terms[i], best first, ties by id.

        A term in which the encoder finds nothing (its vector is 0) says nothing about any document: no hits.
        Raises ValueError if the encoder fails or the GPU cannot find that many.
        """
        vectors = self._encoder.encode([self._prefix + term for term in terms])
        known: NDArray[np.bool_] = np.any(vectors, axis=1)
        hits = [_NOTHING] * len(terms)
        # One k at a time: HNSW looks further for a larger one, and an answer must not depend on its neighbours.
        for k in sorted(set(ks)):
            chosen = [i for i, wanted in enumerate(ks) if wanted == k and known[i]]
            if chosen:
                scores, rows = self._nearest(vectors[chosen], min(k, self._index.rows))
                for place, i in enumerate(chosen):
                    hits[i] = self._hits(scores[place], rows[place], k)
        return hits

    def _nearest(self, vectors: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """At least the k nearest rows, and all that tie with the last of them (4,096 more at most)."""
        most = self._index.most
        if k > most:
            raise ValueError(f"faiss finds at most {most} ids on a GPU: set search.dense.gpu=false for {k}")
        wanted = min(k + 1, most)
        while True:
            scores, rows = self._index.search(vectors, wanted)
            open_tie = (rows[:, -1] >= 0) & (scores[:, -1] == scores[:, k - 1])
            if wanted >= min(most, k + _MOST_TIED) or not open_tie.any():
                return scores, rows
            wanted = min(most, 4 * wanted)

    def _hits(self, scores: NDArray[np.float32], rows: NDArray[np.int64], k: int) -> Hits:
        if rows[-1] < 0:
            scores, rows = scores[rows >= 0], rows[rows >= 0]
        if self._shared:
            spans = [slice(self._starts[row], self._starts[row + 1]) for row in rows.tolist()]
            documents = np.concatenate([self._documents[span] for span in spans])
            scores = np.repeat(scores, [span.stop - span.start for span in spans])
        else:
            documents = self._documents[rows]
        if (scores[1:] == scores[:-1]).any():
            order = np.lexsort((documents, -scores))
            documents, scores = documents[order], scores[order]
        return documents[:k], scores[:k]


def open_index(corpus: Path, settings: DenseSettings, cache_folder: Path, progress: Progress) -> DenseIndex:
    """Open the index of a corpus; whatever the cache does not hold whole is made first.

    Memory: the model, the index (`FaissIndex`), and while passages are encoded 1,024 texts; a corpus that is seen for
    the first time takes some 250 bytes per document meanwhile.

    Raises:
        DataError: the corpus is missing or broken, or the cache cannot be written.
        SearchServerError: the encoder cannot be had, or faiss cannot do what is asked.
    """
    check_settings(settings)
    device = _set_up(settings)
    corpus_name = content_digest(corpus / CORPUS_FILE)[0][:32]
    with locked(cache_folder):
        documents = cache_folder / f"{corpus_name}-v{FORMAT}.passages"
        passages = ensure_passages(corpus, documents)
        if settings.encoder is None:
            settings = _for_corpus_encoder(settings)
            folder = _own_encoder(corpus, passages, cache_folder / f"{corpus_name}-v{corpus_encoder.VERSION}.encoder")
        else:
            folder = encoder_folder(settings.encoder)
            settings = with_folders_own(settings, folder)
        encoder = _encoder(folder, settings, device)
        name = _digest(corpus_name, encoder_identity(folder), *_of_vectors(settings))
        vectors = cache_folder / f"{name}.npy"

        def texts() -> Iterator[str]:
            return (settings.passage_prefix + text for text in distinct_texts(corpus, passages))

        encoded = ensure_vectors(vectors, passages.distinct, encoder.dimension, texts, encoder.encode, progress)
        graph = _digest(name, settings.hnsw_m, settings.hnsw_ef_construction)
        faiss_index = open_faiss(vectors, cache_folder / f"{graph}.faiss", settings)
    made = Made(_version(name, graph, settings), folder, documents, vectors, encoded)
    return DenseIndex(encoder, faiss_index, passages, settings, made)


def _encoder(folder: Path, settings: DenseSettings, device: str) -> Encoder:
    assert settings.pooling is not None, "settled by with_folders_own"
    return Encoder(
        folder,
        pooling=settings.pooling,
        normalize=bool(settings.normalize),
        max_tokens=settings.max_tokens,
        batch=settings.batch,
        device=device,
    )


def _set_up(settings: DenseSettings) -> str:
    """Set the threads of both libraries; return the encoder's device."""
    torch.set_num_threads(settings.threads)
    faiss.omp_set_num_threads(settings.threads)
    if not settings.gpu:
        return "cpu"
    if not torch.cuda.is_available():
        raise SearchServerError("search.dense.gpu: torch sees no GPU: install torch with CUDA, or set gpu=false")
    return "cuda"


def _own_encoder(corpus: Path, passages: Passages, folder: Path) -> Path:
    """The encoder made from this corpus; made again if a file of it has changed."""
    seal = folder.parent / (folder.name + ".sha256")
    if folder.is_dir() and seal.is_file() and seal.read_text() == encoder_identity(folder):
        return folder
    unfinished = folder.parent / (folder.name + ".unfinished")
    for old in (folder, unfinished):
        shutil.rmtree(old, ignore_errors=True)
    corpus_encoder.build_corpus_encoder(lambda: distinct_texts(corpus, passages), passages.distinct, unfinished)
    seal.write_text(encoder_identity(unfinished))
    unfinished.replace(folder)
    return folder


def _for_corpus_encoder(settings: DenseSettings) -> DenseSettings:
    return msgspec.structs.replace(settings, pooling="mean", normalize=True, query_prefix="", passage_prefix="")


def _of_vectors(settings: DenseSettings) -> tuple[object, ...]:
    return FORMAT, settings.pooling, settings.passage_prefix, settings.normalize, settings.max_tokens


def _version(vectors: str, graph: str, settings: DenseSettings) -> str:
    approximate = (graph, settings.hnsw_ef_search) if settings.index == "hnsw" else ()
    return _digest(vectors, settings.query_prefix, *approximate)


def _digest(*parts: object) -> str:
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()[:32]
