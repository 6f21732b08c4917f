"""A worker that a query has taken over can still write to its pipe: nothing that it writes may harm the pool."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

import rewarders
from rewarders.sql import worker_process
from rewarders.sql.errors import SqlRefused, SqlUnavailable
from rewarders.sql.pool import SqlPool

_ROGUE = """
import os, sys, time
import msgspec
from rewarders.frames import frame, read_frame, write_all
from rewarders.sql.wire import Ready

read_frame(0)
if START:
    write_all(1, frame(msgspec.msgpack.encode(Ready("3", (), 0.0))))
    read_frame(0)
write_all(1, ANSWER)
time.sleep(60)
"""


def rogue(folder: Path, answer: bytes, *, starts: bool) -> str:
    """Write a package whose worker module says `answer`; return the PYTHONPATH that finds it first."""
    package = folder / "rewarders" / "sql"
    package.mkdir(parents=True)
    source = Path(str(rewarders.__file__)).parent
    for name in ("frames.py", "sql/__init__.py", "sql/wire.py", "sql/limits.py"):
        (folder / "rewarders" / name).write_text((source / name).read_text())
    (folder / "rewarders" / "__init__.py").write_text("")
    program = _ROGUE.replace("ANSWER", repr(answer)).replace("START", repr(starts))
    (package / "worker.py").write_text(program)
    return os.pathsep.join([str(folder), str(source.parent), str(Path(str(msgspec.__file__)).parents[1])])


def framed(message: object) -> bytes:
    data = msgspec.msgpack.encode(message)
    return len(data).to_bytes(4, "big") + data


_ROWS_BEFORE_CELL = b"\x85\xa4type\xa4rows\xa7columns\x91\xa1a\xa9truncated\xc2\xa5cpu_s\x00\xa4rows\x91\x91"


def framed_cell(cell: bytes) -> bytes:
    data = _ROWS_BEFORE_CELL + cell
    return len(data).to_bytes(4, "big") + data


_RUDE = {
    "deep_cell": framed_cell(b"\x91" * 100_000 + b"\x01"),
    "extension_as_cell": framed_cell(b"\xc7\x01\x05a"),
    "time_as_cell": framed_cell(b"\xd6\xff\x00\x00\x00\x01"),
    "endless_cell": framed_cell(b"\xdb\x7f\xff\xff\xff"),
    "endless_rows": framed_cell(b"\xdd\x7f\xff\xff\xff"),
    "endless_frame": b"\xff\xff\xff\xff" + b"x" * 1000,
    "no_messagepack": b"\x00\x00\x00\x03\xc1\xc1\xc1",
    "no_message": framed({"type": "rows"}),
    "other_message": framed(["rows"]),
    "list_as_cell": framed({"type": "rows", "columns": ["a"], "rows": [[[1]]], "truncated": False, "cpu_s": 0.0}),
    "boolean_as_cell": framed({"type": "rows", "columns": ["a"], "rows": [[True]], "truncated": False, "cpu_s": 0.0}),
    "ragged_rows": framed({"type": "rows", "columns": ["a"], "rows": [[1], [1, 2]], "truncated": False, "cpu_s": 0.0}),
    "greeting": framed({"type": "ready", "sqlite": "3", "guards": [], "cpu_s": 0.0}),
}


async def test_a_plain_answer_is_taken(database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same frame with an honest cell: the rude ones fail for what is rude in them."""
    path = rogue(tmp_path / "rogue", framed_cell(b"\x01"), starts=True)
    monkeypatch.setattr(worker_process, "_environment", lambda: {"PYTHONPATH": path})
    async with SqlPool(workers=1) as pool:
        assert (await pool.run(database, "SELECT 1")).rows == ((1,),)


@pytest.mark.parametrize("name", _RUDE)
async def test_a_rogue_answer_is_refused(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = rogue(tmp_path / "rogue", _RUDE[name], starts=True)
    monkeypatch.setattr(worker_process, "_environment", lambda: {"PYTHONPATH": path})
    async with SqlPool(workers=1) as pool:
        with pytest.raises(SqlRefused, match="ended 2 workers"):
            await pool.run(database, "SELECT 1")


@pytest.mark.parametrize("name", ["endless_frame", "no_messagepack", "list_as_cell"])
async def test_a_rogue_greeting_is_no_start(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = rogue(tmp_path / "rogue", _RUDE[name], starts=False)
    monkeypatch.setattr(worker_process, "_environment", lambda: {"PYTHONPATH": path})
    with pytest.raises(SqlUnavailable, match="SQL worker"):
        await SqlPool(workers=1).start()


async def test_a_silent_worker_is_no_start(database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = rogue(tmp_path / "rogue", b"", starts=False)
    monkeypatch.setattr(worker_process, "_environment", lambda: {"PYTHONPATH": path})
    monkeypatch.setattr(worker_process, "_START_DEADLINE_S", 0.5)
    with pytest.raises(SqlUnavailable, match="did not start in time"):
        await SqlPool(workers=1).start()
