"""SQLite's authorizer callback: a query may read the tables of its database and compute, and nothing else.

Everything is forbidden that is not on a list here, so that a statement, function or virtual table of a newer SQLite is
forbidden until somebody has looked at it. The callback is asked while the statement is compiled: what it denies never
starts to run.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from typing import Final

# Aggregate, window, text, date, mathematical and JSON functions. Left out on purpose: random and randomblob (a reward
# must come out the same twice), load_extension, fts3_tokenizer (leaks pointers), readfile, writefile, edit (of the
# sqlite3 shell), zeroblob and randomblob (only good for making large things), the inspection functions of full-text and
# R-tree indexes, and what tells of the library or the connection.
_FUNCTION_NAMES: Final = """
    avg count group_concat max median min percentile percentile_cont percentile_disc string_agg sum total
    cume_dist dense_rank first_value lag last_value lead nth_value ntile percent_rank rank row_number
    abs char coalesce concat concat_ws format glob hex if ifnull iif instr length like likelihood likely lower ltrim
    match nullif octet_length printf quote replace round rtrim sign soundex substr substring trim typeof unhex unicode
    unistr unistr_quote unlikely upper
    current_date current_time current_timestamp date datetime julianday strftime time timediff unixepoch
    acos acosh asin asinh atan atan2 atanh ceil ceiling cos cosh degrees exp floor ln log log10 log2 mod pi pow power
    radians sin sinh sqrt tan tanh trunc
    -> ->> json json_array json_array_length json_error_position json_extract json_group_array json_group_object
    json_insert json_object json_patch json_pretty json_quote json_remove json_replace json_set json_type json_valid
"""
FUNCTIONS: Final = frozenset(_FUNCTION_NAMES.split())
TABLE_FUNCTIONS: Final = frozenset({"json_each", "json_tree"})
_SCHEMA_TABLES: Final = frozenset({"sqlite_master", "sqlite_schema", "sqlite_sequence"})
_ACTION_NAMES: Final = """
    ALTER_TABLE ANALYZE ATTACH CREATE_INDEX CREATE_TABLE CREATE_TEMP_INDEX CREATE_TEMP_TABLE CREATE_TEMP_TRIGGER
    CREATE_TEMP_VIEW CREATE_TRIGGER CREATE_VIEW CREATE_VTABLE DELETE DETACH DROP_INDEX DROP_TABLE DROP_TEMP_INDEX
    DROP_TEMP_TABLE DROP_TEMP_TRIGGER DROP_TEMP_VIEW DROP_TRIGGER DROP_VIEW DROP_VTABLE INSERT PRAGMA REINDEX SAVEPOINT
    TRANSACTION UPDATE
"""
_ACTIONS: Final[dict[int, str]] = {
    getattr(sqlite3, f"SQLITE_{name}"): name.replace("_", " ") for name in _ACTION_NAMES.split()
}


class Gatekeeper:
    """Authorizer for one connection. tables: names of the tables and views of its database, in any case.

    denied: what was denied first, in words; "" as long as nothing was.
    """

    def __init__(self, tables: Iterable[str]) -> None:
        self._readable = frozenset(map(str.lower, tables)) | _SCHEMA_TABLES | TABLE_FUNCTIONS
        self.denied = ""

    def __call__(
        self, action: int, first: str | None, second: str | None, database: str | None, source: str | None
    ) -> int:
        """SQLite's signature. For a read, first is the table and second the column; for a function, second is its name.

        A read of no column is a count of rows: of a table, or of a common table expression, whose name this cannot
        know. It opens no other table: a virtual one has to declare itself first, which counts as an update.
        """
        if action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_RECURSIVE):
            return sqlite3.SQLITE_OK
        if action == sqlite3.SQLITE_READ:
            allowed = not second or (first or "").lower() in self._readable
            return sqlite3.SQLITE_OK if allowed and database in ("main", None) else self._deny(f"reading {first}")
        if action == sqlite3.SQLITE_FUNCTION:
            return sqlite3.SQLITE_OK if (second or "").lower() in FUNCTIONS else self._deny(f"the function {second}")
        if action == sqlite3.SQLITE_UPDATE and first == "sqlite_master":
            return self._deny("a virtual table")
        return self._deny(_ACTIONS.get(action, f"action {action}"))

    def _deny(self, what: str) -> int:
        self.denied = self.denied or what
        return sqlite3.SQLITE_DENY
