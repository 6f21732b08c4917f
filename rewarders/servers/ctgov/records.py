"""Reads study records from a folder: whole records as ClinicalTrials.gov gives them, or a corpus in BEIR layout.

Whole records are looked for in every `*.json` (a list of studies, an answer with `studies`, or one study) and `*.jsonl`
(one study a line) of the folder. If an id occurs twice, the record updated last counts, and of equals the later one.
A folder with `corpus.jsonl` is a BEIR corpus: its documents become records with title, summary and date, and with
conditions, interventions, phase and enrollment where the metadata has them under the names of the TrialGPT corpora.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.data.beir import CORPUS_FILE, DataError, Document, read_corpus
from rewarders.servers.ctgov.areas import Kind
from rewarders.servers.ctgov.values import span_of
from rewarders.servers.dates import made_up_date

Record = dict[str, Any]
_PHASES = {f"phase {number}": f"PHASE{number}" for number in range(1, 5)} | {
    "early phase 1": "EARLY_PHASE1",
    "n/a": "NA",
}


def data_files(folder: Path) -> list[Path]:
    """The files that records are read from, in the order in which they are read.

    Raises:
        DataError: there are none.
    """
    if (folder / CORPUS_FILE).is_file():
        return [folder / CORPUS_FILE]
    files = sorted(path for suffix in ("json", "jsonl") for path in folder.glob(f"*.{suffix}") if path.is_file())
    if not files:
        raise DataError(f"{folder} holds no study records: name a folder with *.json, *.jsonl or {CORPUS_FILE}")
    return files


def read_records(folder: Path) -> list[Record]:
    """All records of a folder, every id once.

    Raises:
        DataError: there is nothing to read, or something is no study record.
    """
    files = data_files(folder)
    if files[0].name == CORPUS_FILE:
        documents = list(read_corpus(folder))
        return [_record_of(document, position, len(documents)) for position, document in enumerate(documents)]
    records: dict[str, Record] = {}
    for path in files:
        for place, record in _studies(path):
            trial = nct_id(record, place)
            if trial not in records or _updated(record) >= _updated(records[trial]):
                records[trial] = record
    return list(records.values())


def nct_id(record: Record, place: str = "a record") -> str:
    """The id of a record.

    Raises:
        DataError: it has none, so it is no study record.
    """
    found = values_at(record, "protocolSection.identificationModule.nctId")
    if len(found) != 1 or not found[0]:
        raise DataError(f"{place}: no study record: it has no protocolSection.identificationModule.nctId")
    return found[0]


def values_at(value: Any, path: str) -> list[str]:
    """The values at a path of keys, as text, through lists on the way."""
    for key in path.split("."):
        if isinstance(value, list):
            value = [item for entry in value for item in _entries(entry, key)]
        else:
            value = _entries(value, key)
    return [_text(entry) for entry in value if isinstance(entry, str | int | float)]


def _entries(value: Any, key: str) -> list[Any]:
    below = value.get(key) if isinstance(value, dict) else None
    if below is None:
        return []
    return below if isinstance(below, list) else [below]


def _text(value: str | int | float) -> str:
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"
    return str(value)


def _updated(record: Record) -> str:
    found = values_at(record, "protocolSection.statusModule.lastUpdatePostDateStruct.date")
    return found[0] if found else ""


def _studies(path: Path) -> Iterator[tuple[str, Record]]:
    """The studies in one file, each with its place for messages."""
    try:
        text = path.read_text("utf-8")
        if path.suffix == ".jsonl":
            lines = [line for line in text.splitlines() if line.strip()]
            loaded = [json.loads(line) for line in lines]
        else:
            loaded = json.loads(text)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error}): correct or remove it") from None
    if isinstance(loaded, dict):
        loaded = loaded.get("studies", [loaded])
    if not isinstance(loaded, list):
        raise DataError(f"{path}: no list of studies: correct or remove the file")
    for number, record in enumerate(loaded, start=1):
        place = f"{path} study {number}"
        if not isinstance(record, dict):
            raise DataError(f"{place}: not a JSON object: correct or remove the file")
        yield place, record


# BEIR.


def _record_of(document: Document, position: int, total: int) -> Record:
    metadata = document.metadata
    protocol: Record = {
        "identificationModule": {"nctId": document.id, "briefTitle": document.title},
        "statusModule": {"studyFirstPostDateStruct": {"date": _first_posted(document, position, total)}},
        "descriptionModule": {"briefSummary": document.text},
    }
    conditions, interventions = (_texts(metadata.get(key)) for key in ("diseases_list", "drugs_list"))
    if conditions:
        protocol["conditionsModule"] = {"conditions": conditions}
    if interventions:
        protocol["armsInterventionsModule"] = {"interventions": [{"name": name} for name in interventions]}
    design: Record = {}
    if phases := _phases(metadata.get("phase")):
        design["phases"] = phases
    enrollment = span_of(str(metadata.get("enrollment", "")), Kind.NUMBER)
    if enrollment:
        design["enrollmentInfo"] = {"count": int(enrollment[0])}
    if design:
        protocol["designModule"] = design
    return {"protocolSection": protocol}


def _first_posted(document: Document, position: int, total: int) -> str:
    """The document's own `metadata.pub_date` as YYYY-MM-DD, YYYY-MM or YYYY, or else a made-up day, the later in the
    corpus the newer, so that date filters can be tried."""
    written = document.metadata.get("pub_date")
    if written is None:
        day = made_up_date(position, total)
        return f"{day // 10_000:04d}-{day // 100 % 100:02d}-{day % 100:02d}"
    if span_of(str(written), Kind.DATE) is None:
        raise DataError(f"document {document.id!r}: pub_date {written!r} is no date: write YYYY, YYYY-MM or YYYY-MM-DD")
    return str(written).strip().replace("/", "-")


def _texts(value: Any) -> list[str]:
    return [entry for entry in value if isinstance(entry, str)] if isinstance(value, list) else []


def _phases(value: Any) -> list[str]:
    """`Phase 1/Phase 2` as the service writes it."""
    text = value.lower() if isinstance(value, str) else ""
    parts = [text] if text in _PHASES else text.split("/")
    return [_PHASES[part.strip()] for part in parts if part.strip() in _PHASES]
