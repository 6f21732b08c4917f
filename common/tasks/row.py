"""One request and everything its answers are judged by: the same row for every task."""

from __future__ import annotations

from typing import Any, Final

import msgspec

ORIGINAL_PROMPT: Final = "original_prompt"
"""Key of `Row.metadata`: the prompt that was published with the row (`common.data.originals.chat_markup`)."""


class Row(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """One request with its judgments. A task fills in and reads what it needs (`Task.needs`).

    id: distinct within a data set. text: the user's request.

    relevant: ids of the relevant documents, best grade first. grades: their grades above zero, in the same order;
    empty means that all are 1.

    answers: accepted answers (evidence seeking), any one is enough.

    max_date: publication date (YYYY, YYYY/MM or YYYY/MM/DD) up to which the engine may answer, None for no bound;
    it keeps the engine from returning what was published after the request (leak guard).

    database, tables, knowledge, gold_sql (SQL): name of the database, its schema as CREATE TABLE statements, hints
    that belong to the question, and the reference query.

    metadata: anything else, for a user's own task.
    """

    id: str
    text: str
    relevant: tuple[str, ...] = ()
    max_date: str | None = None
    metadata: dict[str, Any] = {}
    grades: tuple[float, ...] = ()
    answers: tuple[str, ...] = ()
    database: str = ""
    tables: str = ""
    knowledge: str = ""
    gold_sql: str = ""

    def __post_init__(self) -> None:
        """Runs on decoding too. Raises ValueError for grades that do not fit the relevant ids."""
        if self.grades and len(self.grades) != len(self.relevant):
            raise ValueError(f"{len(self.grades)} grades for {len(self.relevant)} relevant ids: give one each, or none")
        if not all(0 < grade < float("inf") for grade in self.grades):
            raise ValueError("a grade must be above zero: leave documents that are not relevant out")

    @property
    def judgments(self) -> dict[str, float]:
        """Relevant id -> grade."""
        return dict(zip(self.relevant, self.grades or (1.0,) * len(self.relevant), strict=True))


def to_reference(row: Row) -> dict[str, Any]:
    """What a ticket carries of a row, ready for MessagePack: the fields that are not empty.

    The tables stand in the prompt and are left out, and so is a prompt that was published with the row.
    """
    metadata = {name: value for name, value in row.metadata.items() if name != ORIGINAL_PROMPT}
    fields: dict[str, Any] = msgspec.to_builtins(msgspec.structs.replace(row, tables="", metadata=metadata))
    # Lists, because that is what MessagePack gives back: a ticket equals itself after a journey.
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


def from_reference(reference: dict[str, Any]) -> Row:
    """The row of a ticket. Raises ValueError naming the field that is wrong."""
    try:
        return msgspec.convert(reference, Row)
    except msgspec.ValidationError as error:
        raise ValueError(f"not a task's row: {error}") from None
