"""The trials world: study records as ClinicalTrials.gov's API gives them, and requests with the ids of their trials.

The records tell of the literature of the demo: a trial names its drug by one of two names, its condition by one of
three.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.data.worlds.folders import whole_folder, write_json_lines, write_rows
from common.data.worlds.publications import Study, literature
from common.tasks.row import Row

RECORDS_FILE = "studies.jsonl"
_FIRST_NUMBER = 1_000_000
_PHASES = ("PHASE1", "PHASE2", "PHASE3", "PHASE4")


def build_world(
    folder: str | Path, seed: int = 0, *, trials: int = 2000, train_requests: int = 320, test_requests: int = 80
) -> Path:
    """Write studies.jsonl (one record of API v2 a line) and rows/{train,test}.jsonl; the same seed gives the same
    bytes. Raises ValueError as `build_world`.
    """
    world = literature(seed, trials, train_requests + test_requests)
    rows = [
        Row(f"t{place:04d}", text, tuple(map(nct_id, relevant)))
        for place, (text, relevant) in enumerate(zip(world.requests, world.relevant(), strict=True))
    ]
    with whole_folder(folder) as target:
        records = (
            study_record(place, study, document)
            for place, (study, document) in enumerate(zip(world.studies, world.documents, strict=True))
        )
        write_json_lines(target / RECORDS_FILE, records)
        write_rows(target, "train", rows[:train_requests])
        write_rows(target, "test", rows[train_requests:])
    return Path(folder)


def nct_id(place: int) -> str:
    """The id of the trial at a place of the world."""
    return f"NCT{_FIRST_NUMBER + place:08d}"


def study_record(place: int, study: Study, document: dict[str, Any]) -> dict[str, Any]:
    """One record; the fields are those of the service's data structure."""
    title, text = document["title"], document["text"]
    named = f"{title} {text}"
    condition = next(name for name in study.condition if name.lower() in named.lower())
    drug = next(name for name in (study.drug.generic, study.drug.brand) if name.lower() in named.lower())
    day = document["metadata"]["pub_date"].replace("/", "-")
    return {
        "protocolSection": {
            "identificationModule": {"nctId": nct_id(place), "briefTitle": title},
            "statusModule": {
                "overallStatus": "COMPLETED",
                "studyFirstPostDateStruct": {"date": day, "type": "ACTUAL"},
                "lastUpdatePostDateStruct": {"date": day, "type": "ACTUAL"},
            },
            "descriptionModule": {"briefSummary": text},
            "conditionsModule": {"conditions": [condition]},
            "designModule": {"studyType": "INTERVENTIONAL", "phases": [_PHASES[place % len(_PHASES)]]},
            "armsInterventionsModule": {"interventions": [{"type": "DRUG", "name": drug}]},
        },
        "hasResults": False,
    }
