"""How fast is the dense backend, against transformers and faiss called for the same batches and nothing else?

Both have the same encoder, the same vectors, the same index, the same batches of queries and the same threads, and
are timed in turn, in one run. The library's side is what its documentation shows: tokenizer with padding to the
longest of the batch, model, pooling, normalisation, `index.search`; it ends with row numbers. The backend's side is
`DenseBackend.search`: another process, ids instead of row numbers, ties by id.

Queries: a split of the corpus's folder, or titles of its documents where it has none. Encoder: `--encoder` as in
`search.dense.encoder`; `minilm` is a BERT of 22.7 million random weights with the shape of MiniLM-L6, which costs what
a real one costs and finds nothing.

Prints one JSON line: `backend_per_s`, `library_per_s` (queries; medians over the rounds), `ratio` (median over the
rounds of backend / library of the same round), `same` (share of queries with the same documents in the same order),
`worst_score_difference`, `ndcg_at_10` of the backend (null without judgments), `start_s`, `worker_mib` (peak), and what
was asked for.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from common.data.beir import read_corpus, read_split, splits
from common.metrics.ranking import ndcg
from common.tasks.row import Row
from rewarders.servers.retrieval.backend import Query, Ranking
from rewarders.servers.retrieval.dense import DenseBackend, DenseSettings

Search = Callable[[list[str], int], tuple[np.ndarray, np.ndarray]]


def library_search(corpus: Path, settings: DenseSettings, cache_folder: Path) -> Search:
    """The library's own batch call: (terms, k) -> scores and rows, both [terms, k]; row r is `row_ids(...)[r]`.

    Loads torch and faiss into this process and sets their threads.
    """
    import faiss
    import torch
    from transformers import AutoModel, AutoTokenizer

    from rewarders.servers.retrieval.dense_index import open_index
    from rewarders.servers.retrieval.encoder_modules import with_folders_own

    made = open_index(corpus, settings, cache_folder, lambda done, total: None).made
    settings = with_folders_own(settings, made.encoder)
    device = "cuda" if settings.gpu else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(made.encoder)
    model = AutoModel.from_pretrained(made.encoder).eval().to(device)
    vectors = np.load(made.vectors, allow_pickle=False)
    index: Any = faiss.IndexFlatIP(vectors.shape[1])
    if settings.index == "hnsw":
        index = faiss.IndexHNSWFlat(vectors.shape[1], settings.hnsw_m, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = settings.hnsw_ef_construction
    index.add(vectors)
    if settings.gpu:
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
    longest = settings.max_tokens or 512

    def search(terms: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        texts = [settings.query_prefix + term for term in terms]
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt").to(device)
        with torch.inference_mode():
            hidden = model(**tokens).last_hidden_state
        pooled = _pool(hidden, tokens["attention_mask"], settings.pooling).cpu().numpy()
        if settings.normalize:
            faiss.normalize_L2(pooled)
        if settings.index == "hnsw":
            index.hnsw.efSearch = max(settings.hnsw_ef_search, k)
        return index.search(pooled, k)

    return search


def row_ids(corpus: Path) -> list[str]:
    """The first document of every row of the vectors."""
    from rewarders.servers.retrieval.passages import passage_text

    first: dict[str, str] = {}
    for document in read_corpus(corpus):
        first.setdefault(passage_text(document), document.id)
    return list(first.values())


def library_per_s(search: Search, terms: list[str], k: int, batch: int) -> float:
    """Queries per second of the library's batch call, `batch` at a time."""
    began = time.perf_counter()
    for start in range(0, len(terms), batch):
        search(terms[start : start + batch], k)
    return len(terms) / (time.perf_counter() - began)


async def backend_per_s(backend: DenseBackend, terms: list[str], k: int, batch: int) -> float:
    """Queries per second of the backend, one batch after the other."""
    began = time.perf_counter()
    for start in range(0, len(terms), batch):
        await backend.search([Query(term, k) for term in terms[start : start + batch]])
    return len(terms) / (time.perf_counter() - began)


async def compare(arguments: argparse.Namespace, settings: DenseSettings, cache_folder: Path) -> dict[str, object]:
    rows = _rows(arguments.corpus, arguments.split)[: arguments.queries]
    terms = [row.text for row in rows]
    backend = DenseBackend(arguments.corpus, settings, cache_folder)
    began = time.perf_counter()
    await backend.start()
    start_s = time.perf_counter() - began
    try:
        library = library_search(arguments.corpus, settings, cache_folder)
        rounds = []
        for _ in range(arguments.rounds + 1):
            ours = await backend_per_s(backend, terms, arguments.k, settings.batch)
            rounds.append((ours, library_per_s(library, terms, arguments.k, settings.batch)))
            print(f"backend {rounds[-1][0]:.0f} queries/s, library {rounds[-1][1]:.0f}", file=sys.stderr)
        # The first round warms up.
        report = _rates(rounds[1:])
        found = await backend.search([Query(term, arguments.k) for term in terms])
        rankings = [ranking for ranking in found if isinstance(ranking, Ranking)]
        report |= _agreement(rankings, *library(terms, arguments.k), row_ids(arguments.corpus))
    finally:
        await backend.close()
    judged = any(row.relevant for row in rows)
    report |= {
        "ndcg_at_10": round(statistics.mean(map(_ndcg, rows, rankings)), 4) if judged and arguments.k >= 10 else None,
        "start_s": round(start_s, 1),
        "worker_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024,
        "documents": rankings[0].count,
        "queries": len(terms),
        "k": arguments.k,
        "cores": len(os.sched_getaffinity(0)),
    }
    return report | {name: getattr(settings, name) for name in ("index", "batch", "threads")}


def _rates(rounds: list[tuple[float, float]]) -> dict[str, object]:
    return {
        "backend_per_s": round(statistics.median(ours for ours, _ in rounds)),
        "library_per_s": round(statistics.median(theirs for _, theirs in rounds)),
        "ratio": round(statistics.median(ours / theirs for ours, theirs in rounds), 3),
    }


def _agreement(rankings: list[Ranking], scores: np.ndarray, rows: np.ndarray, ids: list[str]) -> dict[str, object]:
    same = sum(
        list(ranking.ids) == [ids[row] for row in found if row >= 0]
        for ranking, found in zip(rankings, rows, strict=True)
    )
    differences = [
        float(np.abs(np.asarray(ranking.scores) - theirs[: len(ranking.scores)]).max())
        for ranking, theirs in zip(rankings, scores, strict=True)
        if ranking.scores
    ]
    return {"same": round(same / len(rankings), 4), "worst_score_difference": max(differences)}


def _ndcg(row: Row, ranking: Ranking) -> float:
    return ndcg(ranking.ids, dict(zip(row.relevant, row.grades or (1.0,) * len(row.relevant), strict=True)), 10)


def _rows(corpus: Path, split: str) -> list[Row]:
    if split in splits(corpus):
        return read_split(corpus, split)
    return [Row(document.id, document.title or document.text[:80]) for document in read_corpus(corpus)]


def _pool(hidden: Any, mask: Any, pooling: str) -> Any:
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "last":
        return hidden[range(len(hidden)), mask.sum(1) - 1]
    return (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)


def _random_minilm(corpus: Path, folder: Path) -> str:
    """Random weights in the shape of MiniLM-L6, with a vocabulary made from the corpus."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    from rewarders.servers.retrieval.dense_index import open_index

    own = open_index(corpus, DenseSettings(), folder, lambda done, total: None).made.encoder
    tokenizer = AutoTokenizer.from_pretrained(own)
    torch.manual_seed(0)
    shape = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    BertModel(BertConfig(vocab_size=len(tokenizer), **shape), add_pooling_layer=False).save_pretrained(
        folder / "minilm"
    )
    tokenizer.save_pretrained(folder / "minilm")
    return str(folder / "minilm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="BEIR folder")
    parser.add_argument("--split", default="test")
    parser.add_argument("--encoder", help="folder, hub id, or minilm; without it one made from the corpus")
    parser.add_argument("--index", choices=("flat", "hnsw"), default="flat")
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, help="of passages and queries")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        encoder = arguments.encoder
        if encoder == "minilm":
            encoder = _random_minilm(arguments.corpus, Path(folder))
        settings = DenseSettings(
            encoder=encoder,
            index=arguments.index,
            batch=arguments.batch,
            threads=arguments.threads,
            max_tokens=arguments.max_tokens,
        )
        report = asyncio.run(compare(arguments, settings, Path(folder)))
    print(json.dumps({"encoder": arguments.encoder} | report))


if __name__ == "__main__":
    main()
