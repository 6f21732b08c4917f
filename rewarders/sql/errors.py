"""The three ways in which a query gives no table, kept apart because they are worth different rewards."""

from __future__ import annotations


class SqlError(Exception):
    """reason: one line, fit for a log or a sample record."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class SqlRefused(SqlError):  # noqa: N818 (the name of the verdict)
    """The query is at fault, and would be on every day: syntax, an unknown name, something forbidden, too large."""


class SqlTimeout(SqlError):  # noqa: N818
    """The query worked until its deadline. Never an empty table, which could equal an empty gold result."""


class SqlUnavailable(SqlError):  # noqa: N818
    """Ours: no worker, no readable database, a stalled machine. The query may be perfectly good."""


class GoldUnusable(SqlUnavailable):
    """The gold query itself is refused or returns too much: retrying cannot help, its row belongs out of the data."""
