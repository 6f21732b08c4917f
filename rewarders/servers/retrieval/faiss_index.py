"""faiss over the vectors of a corpus: exact (flat) or approximate (HNSW). Only the dense index's process imports this.

Inner product throughout, which is the cosine for unit vectors. HNSW (Malkov and Yashunin 2016, arXiv 1603.09320) is
made for distances: with vectors of very different lengths its recall is lower.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import faiss
import numpy as np
from numpy.typing import NDArray

from rewarders.servers.hosting import SearchServerError
from rewarders.servers.retrieval.dense_wire import DenseSettings
from rewarders.servers.retrieval.sealed import is_sealed, seal
from rewarders.servers.retrieval.vectors import read_vectors

# Its stubs leave out half of it.
_faiss: Any = faiss

GPU_MOST: Final = 2048
"""Most neighbours faiss finds on a GPU."""


class FaissIndex:
    """The vectors, searchable.

    Memory: 4 bytes per number, and with HNSW about 8 · hnsw_m bytes per vector more; on the GPU with `gpu`, else in
    the process.
    """

    def __init__(self, index: Any, settings: DenseSettings) -> None:
        self._index = index
        self._settings = settings
        self.rows: int = index.ntotal
        self.most: int = min(self.rows, GPU_MOST) if settings.gpu else self.rows

    def search(self, vectors: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Scores and rows of the k nearest, best first: two arrays [queries, k]; row -1 where HNSW found no more.

        k: at most `most`.
        """
        parameters = None
        if self._settings.index == "hnsw":
            parameters = _faiss.SearchParametersHNSW(efSearch=max(self._settings.hnsw_ef_search, k))
        scores, rows = self._index.search(np.ascontiguousarray(vectors), k, params=parameters)
        return scores, rows


def check_settings(settings: DenseSettings) -> None:
    """Raise SearchServerError if this faiss cannot do what the settings want."""
    if not settings.gpu:
        return
    if settings.index != "flat":
        raise SearchServerError("faiss searches HNSW on the CPU only: set search.dense.index=flat or gpu=false")
    if not hasattr(faiss, "StandardGpuResources"):
        raise SearchServerError(
            "search.dense.gpu: this faiss is built for the CPU: put faiss-gpu in its place (pip install -e '.[gpu]') "
            "or set search.dense.gpu=false"
        )
    if _faiss.get_num_gpus() == 0:
        raise SearchServerError("search.dense.gpu: faiss sees no GPU here: check the driver, or set gpu=false")


def open_faiss(vectors: Path, graph: Path, settings: DenseSettings) -> FaissIndex:
    """The index over a file of vectors. graph: where the HNSW index is kept; unused by a flat one.

    Raises:
        OSError: the graph cannot be written.
    """
    if settings.index == "hnsw":
        return FaissIndex(_hnsw(vectors, graph, settings), settings)
    numbers = read_vectors(vectors)
    index = _faiss.IndexFlatIP(numbers.shape[1])
    index.add(np.ascontiguousarray(numbers))
    if settings.gpu:
        index = _faiss.index_cpu_to_gpu(_faiss.StandardGpuResources(), 0, index)
    return FaissIndex(index, settings)


def _hnsw(vectors: Path, graph: Path, settings: DenseSettings) -> Any:
    if is_sealed(graph):
        return _faiss.read_index(str(graph))
    numbers = read_vectors(vectors)
    index = _faiss.IndexHNSWFlat(numbers.shape[1], settings.hnsw_m, _faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = settings.hnsw_ef_construction
    index.add(np.ascontiguousarray(numbers))
    unfinished = graph.with_suffix(".unfinished-faiss")
    try:
        _faiss.write_index(index, str(unfinished))
    except RuntimeError as error:  # faiss has no other
        raise OSError(" ".join(str(error).split())[-200:]) from None
    seal(unfinished, graph)
    return index
