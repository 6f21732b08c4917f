"""BEIR sets (Thakur et al. 2021, arXiv 2104.08663) wherever they lie below a folder."""

from __future__ import annotations

import gzip
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from common.data.beir import CORPUS_FILE, QUERIES_FILE, DataError, read_split, splits
from common.data.originals.raw_files import RawSet, files_below, split_of


def read_beir_set(folder: Path, roles: Mapping[str, str]) -> RawSet:
    """The one BEIR folder at or below `folder`; nothing where there is none. Raises DataError."""
    places = sorted({path.parent for path in files_below(folder, QUERIES_FILE)})
    if len(places) > 1:
        listed = ", ".join(map(str, places))
        raise DataError(f"{folder} holds several BEIR folders ({listed}): name one of them")
    found = RawSet()
    for place in places:
        found.corpus = next(iter(files_below(place, CORPUS_FILE)), None)
        with tempfile.TemporaryDirectory() as unpacked:
            source = place if (place / QUERIES_FILE).is_file() else _with_plain_queries(place, Path(unpacked))
            for name in splits(source):
                split = split_of(Path(name), roles)
                if split is not None:
                    found.add(split, read_split(source, name))
    return found


def _with_plain_queries(place: Path, target: Path) -> Path:
    """The folder as the hub has it, `queries.jsonl.gz` unpacked beside links to the judgments."""
    with gzip.open(place / f"{QUERIES_FILE}.gz", "rb") as packed, (target / QUERIES_FILE).open("wb") as plain:
        shutil.copyfileobj(packed, plain)
    (target / "qrels").symlink_to((place / "qrels").resolve())
    return target
