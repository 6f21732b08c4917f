"""A jailed process that runs queries, one at a time: `python -m rewarders.sql.worker`, frames on its standard streams.

It imports little, so that starting one after a kill costs some 50 ms.
"""

from __future__ import annotations

import sqlite3
import sys
import time

import msgspec

from rewarders.frames import frame, read_frame, write_all
from rewarders.sql.confinement import allow_cpu, confine
from rewarders.sql.execution import execute, set_heap_limit
from rewarders.sql.limits import SqlLimits
from rewarders.sql.wire import Failed, Query, Ready, Reply, Rows, Setup

_INPUT, _OUTPUT = 0, 1


def main() -> int:
    """Serve until the pool closes the pipe."""
    setup_frame = read_frame(_INPUT)
    if setup_frame is None:
        return 0
    setup = msgspec.msgpack.decode(setup_frame, type=Setup)
    encoder = msgspec.msgpack.Encoder()
    decoder = msgspec.msgpack.Decoder(Query)
    set_heap_limit(setup.limits)
    _rehearse(setup.limits, encoder)
    guards = confine(setup.limits, setup.folders)
    _send(encoder, Ready(sqlite=sqlite3.sqlite_version, guards=guards, cpu_s=time.process_time()))
    while (received := read_frame(_INPUT)) is not None:
        query = decoder.decode(received)
        allow_cpu(query.deadline_s)
        _send(encoder, execute(query, setup.limits))
    return 0


def _rehearse(limits: SqlLimits, encoder: msgspec.msgpack.Encoder) -> None:
    """Run a good and a bad query before the jail closes: whatever Python loads late is loaded now.

    Raises RuntimeError if SQLite does not work here.
    """
    time.localtime()
    good = execute(Query("file::memory:", "SELECT 1, 'x', date('now')", 5.0), limits)
    bad = execute(Query("file::memory:", "SELECT 1 FROM nowhere", 5.0), limits)
    if not isinstance(good, Rows) or not isinstance(bad, Failed):
        raise RuntimeError(f"SQLite does not work in this interpreter: {good}")
    encoder.encode((good, bad))


def _send(encoder: msgspec.msgpack.Encoder, reply: Reply) -> None:
    try:
        data = frame(encoder.encode(reply))
    except MemoryError:
        failed = Failed("refused", "the result needs more memory than it may have", time.process_time())
        data = frame(encoder.encode(failed))
    write_all(_OUTPUT, data)


if __name__ == "__main__":
    sys.exit(main())
