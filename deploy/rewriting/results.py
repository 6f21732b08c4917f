"""What a user gets: rewrites, and what their queries bring. The same in Python and as JSON."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

ShownCell = int | float | str | None


class _Result(BaseModel):
    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class Hit(_Result):
    """One document."""

    id: str
    title: str = ""
    """ "" where nobody knows it."""
    url: str = ""
    """Where it can be read; "" for a corpus of one's own."""


class Found(_Result):
    """What one query brought."""

    query: str
    count: int = 0
    """All matches of a search, returned or not; rows of a table."""
    hits: tuple[Hit, ...] = ()
    """The first of the matches, best first."""
    translation: str = ""
    """How the engine understood the query."""
    warnings: tuple[str, ...] = ()
    """The engine's remarks, e.g. about words it does not know."""
    columns: tuple[str, ...] = ()
    """Of a SQL query's result."""
    rows: tuple[tuple[ShownCell, ...], ...] = ()
    """The first rows of a SQL query's result; a BLOB is hexadecimal."""
    truncated: bool = False
    """Whether the result has more rows than these."""
    refused: str = ""
    """Why the engine does not take the query; "" where it does."""


class Rewrite(_Result):
    """One rewritten request."""

    request: str
    task: str
    query: str
    """What to search for; "" where the model wrote no answer."""
    reasoning: str = ""
    """The think part."""
    invalid: str = ""
    """Why there is no query; "" where there is one."""
    cut: bool = False
    """Whether the response was longer than it may be, and was ended where it was cut."""
    tokens: int = Field(default=0, ge=0)
    """Tokens that were generated."""
    text: str = ""
    """What the model wrote."""
    found: Found | None = None
    """What the query brought, where a search was asked for."""
    unavailable: str = ""
    """Why the search that was asked for could not be made."""
