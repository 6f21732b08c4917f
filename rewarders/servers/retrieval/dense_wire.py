"""What the dense backend and its process say to each other: settings, and MessagePack in `rewarders.frames`."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

Pooling = Literal["mean", "cls", "last"]
MAX_FRAME_BYTES: Final = 1 << 30


class DenseSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The config section `search.dense`, field by field: `DenseSettings(**config.search.dense.model_dump())`.

    encoder: Hugging Face folder or hub id; None for one made from the corpus, which brings its own pooling (mean),
    no prefixes and unit vectors. max_tokens: longer texts are cut; None for what the model can take. hnsw_m: links
    per vector. hnsw_ef_construction, hnsw_ef_search: candidates looked at when a vector is put in and when one is
    sought (never fewer than the ids wanted). batch: most texts encoded at once. threads: of encoder and index. pooling,
    normalize: None for what the encoder's folder says (`encoder_modules`).

    Pooling, prefixes and length are the encoder's own and stand in its model card; by them, E5 wants mean and
    `query: `, `passage: `; BGE (English, v1.5) cls and `Represent this sentence for searching relevant passages: ` for
    queries only; Contriever mean, no prefix and normalize off.
    """

    encoder: str | None = None
    pooling: Pooling | None = None
    query_prefix: str = ""
    passage_prefix: str = ""
    normalize: bool | None = None
    max_tokens: int | None = None
    index: Literal["flat", "hnsw"] = "flat"
    hnsw_m: int = 32
    hnsw_ef_construction: int = 200
    hnsw_ef_search: int = 128
    gpu: bool = False
    batch: int = 64
    threads: int = 1


class Setup(msgspec.Struct, frozen=True, tag="setup"):
    """First frame to the process. corpus, cache_folder: paths."""

    corpus: str
    cache_folder: str
    settings: DenseSettings


class Search(msgspec.Struct, frozen=True, tag="search"):
    """number: comes back with the answer. terms, ks: of equal length, not empty."""

    number: int
    terms: list[str]
    ks: list[int]


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """Passages encoded so far, and in all."""

    done: int
    total: int


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The index is open. passages: path of the file with the ids. encoded: passages encoded by this start, 0 where all
    came from the cache.
    """

    version: str
    passages: str
    encoded: int


class Found(msgspec.Struct, frozen=True, tag="found"):
    """One ranking per term, in order, all in one: lengths, then the documents' numbers (int32) and scores (float32).

    Numbers instead of ids spare the making and reading of a string per document, which at k = 1000 costs a third of
    a cheap encoder's batch.
    """

    number: int
    lengths: list[int]
    documents: bytes
    scores: bytes


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """corpus: DataError at the start. start: any other reason not to start. search: this one search."""

    kind: Literal["corpus", "start", "search"]
    reason: str
    number: int = 0


Reply = Progress | Ready | Found | Failed
