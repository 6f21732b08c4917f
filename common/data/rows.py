"""Requests of any task, one `Row` as JSON per line: `rows/<split>.jsonl` beside or instead of BEIR judgments.

A line has the fields of `common.tasks.row.Row`; only `id` and `text` must be there, e.g. {"id": "nq-1", "text": "who
sings …", "answers": ["Linda Davis"]} or {"id": "s-1", "text": "How many …", "database": "concert_singer", "tables":
"CREATE TABLE …", "gold_sql": "SELECT …"}.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from common.config.schema import DataConfig
from common.data.beir import DataError, read_split
from common.tasks.row import Row

ROWS_FOLDER = "rows"


def read_requests(folder: str | Path, split: str) -> list[Row]:
    """The requests of a split: of `rows/<split>.jsonl` where it exists, else the judged ones of a BEIR folder.

    Raises:
        DataError: as `read_split`, or a line is no row, or an id occurs twice.
    """
    path = Path(folder) / ROWS_FOLDER / f"{split}.jsonl"
    return _read_rows(path) if path.is_file() else read_split(folder, split)


def requests_of(data: DataConfig, split: str) -> list[Row]:
    """The requests of a split of a run, without the rows it leaves out.

    Raises:
        DataError: as `read_requests`.
    """
    excluded = frozenset(data.exclude)
    return [row for row in read_requests(data.corpus, split) if row.id not in excluded]


def _read_rows(path: Path) -> list[Row]:
    decoder = msgspec.json.Decoder(Row)
    rows: dict[str, Row] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise DataError(f"{path.name} line {number}: {error}: fix or remove the line") from None
            if row.id in rows:
                raise DataError(f"{path.name} line {number}: the id {row.id!r} occurs twice: give every row its own")
            rows[row.id] = row
    return list(rows.values())
