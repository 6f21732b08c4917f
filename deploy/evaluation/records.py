"""One line per request on disk, written when it is finished: what an evaluation goes on from, whatever ended it."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from common.tracking.jsonl import JsonlFile, read_jsonl, replace_file
from deploy.errors import LaunchError

Apart = Literal["", "unavailable", "too_long", "refused", "unusable"]
SampleKind = Literal["scored", "invalid", "unavailable"]


class SampleRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """One answer.

    Attributes:
        kind: scored; invalid: it breaks the format, or the engine refuses the query; unavailable: nobody knows.
        text: of the model, "" where there was none.
        tokens: of the text.
        cut: it reached the longest length allowed.
        query: what was searched, or would have been.
        reason: why it is not scored.
        reward: of the task's table; None where unavailable.
    """

    kind: SampleKind
    text: str = ""
    tokens: int = 0
    cut: bool = False
    query: str = ""
    reason: str = ""
    reward: float | None = None
    metrics: dict[str, float] = {}


class QueryRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """One request.

    Attributes:
        apart: why this request counts in no figure; "" where it counts. unavailable: the engine or the endpoint could
            not be asked (tried again when the evaluation goes on). too_long: the prompt does not fit. refused: by the
            endpoint. unusable: the row itself can never be scored.
        reason: of `apart`, one line.
        calls: searches that the engine was asked since the line before was written, retries included.
        ranking: ids the first sample's query returned, best first; None where they are not kept.
    """

    id: str
    request: str
    samples: list[SampleRecord] = []
    apart: Apart = ""
    reason: str = ""
    calls: int = 0
    ranking: list[str] | None = None


class RecordFile:
    """The records of one method: those that are there, and a place for more.

    A line that was being written when a process died is cut off; `cut_bytes` says how much that was. Requests that
    could not be scored for an outage are taken out, to be tried again; so are those without a ranking where
    `rankings` are wanted.

    Raises:
        LaunchError: another line is broken. OSError: the file cannot be written.
    """

    def __init__(self, path: Path, rankings: bool = False) -> None:
        before = path.stat().st_size if path.exists() else 0
        self._file = JsonlFile(path)
        self.cut_bytes = max(0, before - path.stat().st_size)
        self.records = {record.id: record for record in read_records(path) if _is_final(record, rankings)}
        self._file.keep(lambda line: line["id"] in self.records)

    def append(self, record: QueryRecord) -> None:
        """Write one record; it is on its way to the disk when this returns."""
        self._file.append(msgspec.to_builtins(record))
        self.records[record.id] = record

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_records(path: Path) -> list[QueryRecord]:
    """All whole records of a file. Raises LaunchError naming a line that is none."""
    try:
        return msgspec.convert(read_jsonl(path), list[QueryRecord])
    except (ValueError, msgspec.ValidationError) as error:
        raise LaunchError(f"{path}: {error}: remove the broken line, or name another --out") from None


class Identity(msgspec.Struct, frozen=True):
    """What an evaluation is of, as in evaluation.json.

    Attributes:
        fingerprint: part -> digest; all are equal where an evaluation goes on.
        comparable: part -> digest; all are equal where the figures of two evaluations are of the same thing.
        sampling: samples, temperature and so on.
        metric: the task's own.
    """

    fingerprint: dict[str, str]
    comparable: dict[str, str] = {}
    model: str = ""
    task: str = ""
    dataset: str = ""
    split: str = ""
    engine: str = ""
    metric: str = ""
    sampling: dict[str, Any] = {}


class EvaluationFolder:
    """Where the files of one evaluation lie."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results = path / "results.json"
        self.table = path / "table.md"
        self.log = path / "log.txt"
        self._identity = path / "evaluation.json"

    def records_of(self, baseline: str | None) -> Path:
        """The records of the model, or of a baseline."""
        return self.path / ("queries.jsonl" if baseline is None else f"baselines/{baseline}.jsonl")

    def claim(self, fingerprint: Mapping[str, str], description: Mapping[str, Any]) -> bool:
        """Begin an evaluation here, or go on with one: True. description: the other fields of `Identity`.

        Raises:
            LaunchError: an evaluation of something else lies here; says what differs.
        """
        known = self.identity().fingerprint if self._identity.is_file() else None
        differing = [part for part in fingerprint if known is not None and known.get(part) != fingerprint[part]]
        if differing:
            raise LaunchError(
                f"{self.path} holds an evaluation with another {' and '.join(differing)}: name another folder "
                "with --out, or remove that one"
            )
        content = {"fingerprint": dict(fingerprint), **description}
        replace_file(self._identity, msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n")
        return known is not None

    def identity(self) -> Identity:
        """What lies here. Raises LaunchError where there is no evaluation."""
        try:
            return msgspec.json.decode(self._identity.read_bytes(), type=Identity)
        except FileNotFoundError:
            raise LaunchError(
                f"{self.path} holds no evaluation: name a folder that `deepretrieval eval` wrote"
            ) from None
        except (OSError, msgspec.DecodeError) as error:
            raise LaunchError(f"{self._identity} cannot be read: {error}") from None

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes out. Raises LaunchError where one is at work here."""
        self.path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LaunchError(
                f"another evaluation is at work in {self.path}: wait for it, or name another --out"
            ) from None
        else:
            yield
        finally:
            os.close(descriptor)


def _is_final(record: QueryRecord, rankings: bool) -> bool:
    if record.apart:
        return record.apart != "unavailable"
    return record.ranking is not None or not rankings
