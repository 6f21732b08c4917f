"""Reads what wandb writes offline: the records it would upload."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path


def leveldb_log(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format (32 KiB blocks) after a header of seven bytes."""
    content, at, parts = path.read_bytes(), 7, b""
    while at < len(content):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        size, kind = struct.unpack_from("<HB", content, at + 4)
        parts += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield parts
            parts = b""


def wandb_records(path: Path) -> dict[str, object]:
    """History rows, summary and config of an offline run, as W&B would upload them."""
    from wandb.proto import wandb_internal_pb2

    history: list[dict[str, float]] = []
    summary: dict[str, object] = {}
    config: dict[str, object] = {}
    for data in leveldb_log(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            items = {".".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            history.append({key: json.loads(value) for key, value in items.items()})
        summary.update((item.key, json.loads(item.value_json)) for item in record.summary.update)
        config.update((item.key, json.loads(item.value_json)) for item in record.run.config.update)
    return {"history": history, "summary": summary, "config": config}
