"""From a data set's raw files to the folder a run reads: rows/<split>.jsonl, corpus.jsonl or databases/ beside them.

Nothing large is copied: the corpus is a symbolic link. Databases are hard links, because the SQL jail sees only what
really lies in its folder; they are copied where raw and prepared folder are on different file systems.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import msgspec

from common.data.beir import CORPUS_FILE, DataError
from common.data.catalogue import Dataset
from common.data.originals.beir_sets import read_beir_set
from common.data.originals.own_rows import read_own_set
from common.data.originals.parquet_rows import read_parquet_set
from common.data.originals.questions import read_question_set
from common.data.originals.raw_files import RawSet, files_below, open_text
from common.data.originals.reviews import read_review_set
from common.data.originals.sql_sets import read_sql_set
from common.data.rows import ROWS_FOLDER, read_requests
from common.data.splits import cut, same_request, with_distinct_ids, without_shared
from common.data.worlds.folders import whole_folder, write_lines, write_rows
from common.tasks.row import ORIGINAL_PROMPT, Row

RECORD_FILE: Final = "dataset.json"
DATABASES_FOLDER: Final = "databases"
OWN: Final = Dataset("own", "", (), "beir", {}, "yours", 0.0, ())
"""A user's own set."""

Report = Callable[[str], None]
"""Told in words what is going on."""


class Prepared(msgspec.Struct, frozen=True):
    """What became of a data set; kept as dataset.json in its folder.

    rows: by split. repeated: rows of a split that another file of it held too. shared: rows taken out because
    another split keeps them, by "split/keeper". left_out: reason -> rows. cut: split cut off -> its seed. prompts: rows
    that carry the original's prompt. notes: what is still missing.
    """

    name: str
    task: str
    rows: dict[str, int]
    repeated: dict[str, int] = {}
    shared: dict[str, int] = {}
    left_out: dict[str, int] = {}
    cut: dict[str, int] = {}
    prompts: int = 0
    notes: tuple[str, ...] = ()


def prepare(
    dataset: Dataset,
    raw: Path,
    out: Path,
    *,
    seed: int = 0,
    dev_rows: int | None = None,
    say: Report = lambda text: None,
) -> Prepared:
    """Write the folder `out` of a data set whose raw files lie below `raw`; the same input gives the same rows.

    Args:
        seed: of the validation split, where it is cut from train. dev_rows: its size, None for a tenth of train and 500
            at most.

    Raises:
        DataError: raw files are missing or broken, or `out` holds something else.
    """
    _check_folders(raw, out)
    if dataset.layout == "passages":
        return _prepare_passages(dataset, raw, out, say)
    say(f"reading {raw}")
    found = _read(dataset, raw, out)
    if not any(found.splits.values()):
        raise DataError(f"{raw} holds no rows of {dataset.name}: see docs/data.md for the files it is made of")
    splits, prepared = _arrange(dataset, found, seed, dev_rows)
    with whole_folder(out) as folder:
        for split, rows in splits.items():
            write_rows(folder, split, rows)
        _link_corpus(found.corpus or _shared_corpus(dataset, out), folder)
        notes = _link_databases(found.databases, splits, folder)
        if dataset.corpus_of and not (folder / CORPUS_FILE).exists():
            notes += (f"no {CORPUS_FILE}: prepare {dataset.corpus_of} beside it first, then this again",)
        prepared = msgspec.structs.replace(prepared, notes=notes)
        (folder / RECORD_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(prepared), indent=1) + b"\n")
    return prepared


def read_record(folder: Path) -> Prepared | None:
    """What `prepare` has left in a folder; None where it has left nothing."""
    try:
        return msgspec.json.decode((folder / RECORD_FILE).read_bytes(), type=Prepared)
    except (OSError, msgspec.DecodeError):
        return None


# ---------------------------------------------------------------------- rows


def _read(dataset: Dataset, raw: Path, out: Path) -> RawSet:
    """The rows of the set's own layout; of the original's parquet files where that finds none.

    Where both are there, the parquet files lend their prompts.
    """
    match dataset.layout:
        case _ if dataset.name == OWN.name:
            return _read_own(raw)
        case "merged":
            return _read_merged(dataset, out)
        case "beir":
            found = read_beir_set(raw, dataset.roles)
        case "questions":
            found = read_question_set(raw, dataset.roles)
        case "reviews":
            found = read_review_set(raw, dataset.roles)
        case "sql":
            found = read_sql_set(raw, dataset.roles)
        case _:
            found = RawSet()
    originals = read_parquet_set(raw, dataset.task, dataset.roles)
    if not any(found.splits.values()):
        return originals
    return _with_prompts(found, originals)


def _read_own(raw: Path) -> RawSet:
    """A BEIR folder, or rows of two fields."""
    found = read_beir_set(raw, {}) if raw.is_dir() else RawSet()
    return found if found.splits else read_own_set(raw, {})


def _read_merged(dataset: Dataset, out: Path) -> RawSet:
    """The rows of other prepared sets beside `out`; ids and databases get the set's name in front."""
    found = RawSet()
    for part in dataset.parts:
        folder = out.parent / part
        if read_record(folder) is None:
            raise DataError(
                f"{folder} is not there: {dataset.name} is made of {' and '.join(dataset.parts)}, so prepare those"
            )
        for path in sorted((folder / ROWS_FOLDER).glob("*.jsonl")):
            found.add(path.stem, (_prefixed(row, part) for row in read_requests(folder, path.stem)))
        for path in files_below(folder / DATABASES_FOLDER, ".sqlite"):
            found.databases[f"{part}_{path.stem}"] = path
    return found


def _prefixed(row: Row, part: str) -> Row:
    return msgspec.structs.replace(row, id=f"{part}-{row.id}", database=f"{part}_{row.database}")


def _with_prompts(found: RawSet, originals: RawSet) -> RawSet:
    prompts = {same_request(row): row.metadata for rows in originals.splits.values() for row in rows}
    for split, rows in found.splits.items():
        found.splits[split] = [
            msgspec.structs.replace(row, metadata={**row.metadata, **prompts[same_request(row)]})
            if same_request(row) in prompts
            else row
            for row in rows
        ]
    return found


def _arrange(dataset: Dataset, found: RawSet, seed: int, dev_rows: int | None) -> tuple[dict[str, list[Row]], Prepared]:
    """Splits without what others share; `dev` (and `test` of an own file) cut from train."""
    splits, shared = without_shared(found.splits)
    cuts: dict[str, int] = {}
    for split in ("test", "dev") if dataset.name == OWN.name else ("dev",):
        if not splits.get(split) and splits.get("train"):
            splits["train"], splits[split] = cut(splits["train"], seed, dev_rows)
            cuts[split] = seed
    splits = with_distinct_ids({split: rows for split, rows in splits.items() if rows})
    return splits, Prepared(
        name=dataset.name,
        task=dataset.task,
        rows={split: len(rows) for split, rows in splits.items()},
        repeated=found.repeated,
        shared=shared,
        left_out=found.left_out,
        cut={split: seed for split in cuts if split in splits},
        prompts=sum(ORIGINAL_PROMPT in row.metadata for rows in splits.values() for row in rows),
    )


# ---------------------------------------------------------------------- corpus and databases


def _shared_corpus(dataset: Dataset, out: Path) -> Path | None:
    """The corpus of the set it shares one with, prepared beside it."""
    corpus = out.parent / (dataset.corpus_of or dataset.name) / CORPUS_FILE
    return corpus if dataset.corpus_of and corpus.exists() else None


def _link_corpus(corpus: Path | None, folder: Path) -> None:
    if corpus is None:
        return
    if corpus.suffix == ".gz":
        with open_text(corpus) as packed, (folder / CORPUS_FILE).open("w", encoding="utf-8", newline="") as plain:
            shutil.copyfileobj(packed, plain)
    else:
        (folder / CORPUS_FILE).symlink_to(corpus.resolve())


def _link_databases(databases: dict[str, Path], splits: dict[str, list[Row]], folder: Path) -> tuple[str, ...]:
    """Those that rows ask about; returns a note if rows ask about others."""
    wanted = {row.database for rows in splits.values() for row in rows if row.database}
    for name in sorted(wanted & databases.keys()):
        target = folder / DATABASES_FOLDER / f"{name}.sqlite"
        target.parent.mkdir(exist_ok=True)
        source = databases[name].resolve()
        try:
            os.link(source, target)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(source, target)
    missing = sorted(wanted - databases.keys())
    if not missing:
        return ()
    return (f"{len(missing)} databases are missing, {missing[0]} for one: put their files below the raw folder",)


# ---------------------------------------------------------------------- DPR's passages


def _prepare_passages(dataset: Dataset, raw: Path, out: Path, say: Report) -> Prepared:
    """`psgs_w100.tsv` (id, text, title) as corpus.jsonl."""
    tables = files_below(raw, ".tsv")
    if len(tables) != 1:
        raise DataError(
            f"{raw} should hold one file, psgs_w100.tsv.gz, and holds {len(tables)} tables: download it again"
        )
    with whole_folder(out) as folder:
        write_lines(folder / CORPUS_FILE, _passages(tables[0], say))
        prepared = Prepared(dataset.name, dataset.task, {})
        (folder / RECORD_FILE).write_bytes(msgspec.json.encode(prepared) + b"\n")
    return prepared


def _passages(table: Path, say: Report) -> Iterator[str]:
    csv.field_size_limit(sys.maxsize)
    with open_text(table) as file:
        for number, columns in enumerate(csv.reader(file, delimiter="\t")):
            if number == 0 and columns[0] == "id":
                continue
            if len(columns) != 3:
                raise DataError(f"{table.name} line {number + 1}: not id, text and title: download it again")
            identifier, text, title = columns
            yield json.dumps({"_id": identifier, "title": title, "text": text}, ensure_ascii=False)
            if number % 500_000 == 0:
                say(f"{number:,} passages written")


def _check_folders(raw: Path, out: Path) -> None:
    """Nothing of the user's may be lost: `out` is replaced as a whole."""
    if not raw.exists():
        raise DataError(f"{raw} is not there: download the set first, or name the folder of its files with --raw")
    source, target = raw.resolve(), out.resolve()
    if source == target or target in source.parents or source in target.parents:
        raise DataError(f"{raw} and {out} lie in one another: name a folder of its own with --out")
    if out.is_dir() and any(out.iterdir()) and read_record(out) is None:
        raise DataError(f"{out} holds something that `data prepare` has not written: name another folder with --out")
