"""What the engine returned for one query: a ranking, or the tables of an executed SQL query."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from common.sql.table import Table

EngineKind = Literal["pubmed", "ctgov", "bm25", "dense", "sqlite"]
ExecutionStatus = Literal["ok", "refused", "timeout"]


@dataclass(frozen=True, slots=True)
class Hits:
    """A search engine's answer.

    ids: document ids in the engine's order. count: all matches, returned or not.

    texts, titles: of the same documents, for tasks with `needs_texts`, else None. Any sequence will do; one that
    reads a passage only when it is asked for saves reading what nobody looks at.
    """

    ids: Sequence[str]
    count: int
    texts: Sequence[str] | None = None
    titles: Sequence[str] | None = None


@dataclass(frozen=True, slots=True)
class Execution:
    """What became of one SQL query on its database.

    status: "ok" ran to its end; "refused" by SQLite or by the jail, detail says why; "timeout" was stopped.
    table: its result, where it ran. gold: the result of the reference query.

    A reference query that fails says nothing about the model's: the engine then counts as unavailable, and there
    is no outcome.
    """

    status: ExecutionStatus
    table: Table | None = None
    gold: Table | None = None
    detail: str = ""

    def __post_init__(self) -> None:
        if self.status == "ok" and (self.table is None or self.gold is None):
            raise ValueError("a query that ran comes with its table and with the one of the reference query")


Outcome = Hits | Execution
