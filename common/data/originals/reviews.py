"""Systematic reviews as requests: LEADS (Wang et al. 2025, arXiv 2501.16255), for PubMed and ClinicalTrials.gov.

A line is {id, pico: {P, I, C, O}, publication_pmids | trial_nctids, pub_date}; `pub_date` is the day the review was
published, up to which its studies were. The original's own extract, {pico | input: text, target | label: ids}, is read
too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.data.beir import CORPUS_FILE, DataError
from common.data.originals.raw_files import RawSet, files_below, json_objects, split_of, text_of, texts_of
from common.tasks.row import Row

ELEMENTS = "PICO"
LABELS = ("publication_pmids", "trial_nctids", "target", "label", "relevant")
_DATE = re.compile(r"\d{4}(/\d{1,2}(/\d{1,2})?)?")


def read_review_set(folder: Path, roles: Mapping[str, str]) -> RawSet:
    """Every .jsonl file whose name says which split it is. Raises DataError."""
    found = RawSet()
    for path in files_below(folder, ".jsonl"):
        split = split_of(path, roles)
        if path.name == CORPUS_FILE:
            found.corpus = path
        elif split is not None:
            start = len(found.splits.get(split, ()))
            read = [_row(row, f"{split}-{start + n}", place) for n, (place, row) in enumerate(json_objects(path))]
            rows = [row for row in read if row.relevant]
            found.leave_out("no study", len(read) - len(rows))
            found.add(split, rows)
    return found


def date_of(row: Mapping[str, Any], place: str) -> str | None:
    """`pub_date` as YYYY[/MM[/DD]]; None where the row has none. Raises DataError."""
    value = row.get("pub_date")
    if value in (None, ""):
        return None
    text = str(value).replace("-", "/")
    if not _DATE.fullmatch(text):
        raise DataError(f"{place}: pub_date {value!r} is no date as YYYY/MM/DD: mend it")
    return text


def _row(row: Mapping[str, Any], number: str, place: str) -> Row:
    pico = row.get("pico")
    if isinstance(pico, Mapping):
        text = "".join(f"{letter}: {pico.get(letter) or ''}\n" for letter in ELEMENTS)
    else:
        text = text_of(row, ("pico", "input", "text"), place)
    return Row(str(row.get("id") or number), text, texts_of(row, LABELS), date_of(row, place))
