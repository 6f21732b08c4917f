"""What the BM25 backend and its JVM processes say to each other: MessagePack in frames (`rewarders.frames`)."""

from __future__ import annotations

import msgspec

from rewarders.servers.retrieval.backend import Query

# To a worker: first Build or Open, then batches.


class Build(msgspec.Struct, frozen=True, tag="build"):
    """Make an index of a document store in an empty folder."""

    documents: str
    digest: str
    folder: str


class Open(msgspec.Struct, frozen=True, tag="open"):
    """Search the index in a folder from now on. boolean: queries are in the language of `boolean_query`. exact_up_to:
    documents up to which all matches are counted; above, counting stops where it would cost more than searching.
    documents, digest: the store it was made from.
    """

    folder: str
    documents: str
    digest: str
    k1: float
    b: float
    boolean: bool
    threads: int
    exact_up_to: int


class Batch(msgspec.Struct, frozen=True, tag="batch"):
    """Queries to answer together."""

    queries: tuple[Query, ...]


ToWorker = Build | Open | Batch

# From a worker: Progressed and Built, or Opened and then Answers.


class Progressed(msgspec.Struct, frozen=True, tag="progressed"):
    """Documents indexed so far, and in all."""

    done: int
    total: int


class Built(msgspec.Struct, frozen=True, tag="built"):
    """The index is complete."""


class Opened(msgspec.Struct, frozen=True, tag="opened"):
    """The worker takes batches. documents: in the index. software: versions, for people."""

    documents: int
    software: str


class Ranked(msgspec.Struct, frozen=True, tag="ranked", array_like=True):
    """As `backend.Ranking`."""

    ids: tuple[str, ...]
    scores: tuple[float, ...]
    count: int


class Refused(msgspec.Struct, frozen=True, tag="refused", array_like=True):
    """As `backend.Refusal`."""

    reason: str


class Failed(msgspec.Struct, frozen=True, tag="failed", array_like=True):
    """The worker could not answer, for reasons of its own."""

    reason: str


Answer = Ranked | Refused | Failed


class Answers(msgspec.Struct, frozen=True, tag="answers"):
    """One answer per query of a batch, in its order."""

    answers: tuple[Answer, ...]


FromWorker = Progressed | Built | Opened | Answers
