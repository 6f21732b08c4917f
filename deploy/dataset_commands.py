"""`deepretrieval data list|download|prepare|index`: the original's data sets, and a user's own."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from common.data.catalogue import DATASETS, Count, Dataset
from deploy.assets import cache_folder
from deploy.errors import LaunchError
from deploy.search_server_command import SECTIONS, add_section, section_of
from deploy.terminal import progress_bar

if TYPE_CHECKING:
    from rich.table import Table

    from common.data.prepare import Prepared

_SPLITS = ("train", "dev", "test")


@dataclasses.dataclass(frozen=True)
class Places:
    """Where data sets lie: prepared in root/NAME, their raw files in root/raw/NAME."""

    root: Path

    def raw(self, name: str) -> Path:
        return self.root / "raw" / name

    def prepared(self, name: str) -> Path:
        return self.root / name


def add_commands(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands below `data`."""
    listing = kinds.add_parser("list", help="every data set of the original: task, size, licence, what is here")
    listing.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    _add_folder(listing)
    listing.set_defaults(handler=_list)
    _add_download(kinds)
    _add_prepare(kinds)
    _add_index(kinds)


def _add_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=Path, help="of all data sets; default: datasets/ in the cache folder")


def _places(arguments: argparse.Namespace) -> Places:
    return Places(arguments.folder or cache_folder() / "datasets")


# ---------------------------------------------------------------------- list


def _list(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    places = _places(arguments)
    entries = [_entry(dataset, places) for dataset in DATASETS.values()]
    if arguments.json:
        print(msgspec.json.format(msgspec.json.encode({"folder": str(places.root), "datasets": entries})).decode())
        return 0
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(_table(entries))
    console.print(
        f"~ estimated, † published, else counted in the original's files. Folder: {places.root}", soft_wrap=True
    )
    return 0


def _entry(dataset: Dataset, places: Places) -> dict[str, Any]:
    """What is known of a set, and what of it is here: `prepared`, `downloaded` or nothing."""
    from common.data.prepare import read_record

    record = read_record(places.prepared(dataset.name))
    raw = places.raw(dataset.name)
    here = "prepared" if record else "downloaded" if raw.is_dir() and any(raw.iterdir()) else ""
    return {**msgspec.to_builtins(dataset), "here": here, "prepared_rows": record.rows if record else {}}


def _table(entries: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("name", "task", "engines", "train", "dev", "test", "documents", "disk", "licence", "here"):
        table.add_column(title, justify="right" if title in (*_SPLITS, "documents", "disk") else "left")
    for entry in entries:
        counts = (entry["splits"].get(split) for split in _SPLITS)
        table.add_row(
            entry["name"], entry["task"] or "(corpus)", " ".join(entry["engines"]), *map(_count, counts),
            f"{entry['documents']:,}" if entry["documents"] else "", _gigabytes(entry["disk_gb"]),
            entry["licence"], _here(entry),
        )  # fmt: skip
    return table


def _count(count: dict[str, Any] | None) -> str:
    if count is None:
        return ""
    known = msgspec.convert(count, Count)
    mark = {"estimated": "~", "published": "†", "measured": ""}[known.basis]
    return f"{mark}{known.rows:,}"


def _gigabytes(number: float) -> str:
    return "" if not number else f"{number:g} GB"


def _here(entry: dict[str, Any]) -> str:
    rows = " ".join(f"{split} {number:,}" for split, number in entry["prepared_rows"].items())
    return f"prepared: {rows}" if rows else entry["here"] or "-"


# ---------------------------------------------------------------------- download


def _add_download(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    download = kinds.add_parser("download", help="fetch raw files of data sets; goes on where it was interrupted")
    download.add_argument("names", nargs="+", metavar="NAME", choices=[*DATASETS], help="as `data list` names them")
    download.add_argument("--extras", action="store_true", help="also the original's rows with its own prompts")
    download.add_argument("--mirror", action="store_true", help="BEIR sets from the hub instead of BEIR's own host")
    _add_folder(download)
    download.set_defaults(handler=_download)


def _download(arguments: argparse.Namespace) -> int:
    from deploy.downloads.dataset import download

    places = _places(arguments)
    for name in dict.fromkeys(_with_parts(arguments.names)):
        folder = places.raw(name)
        with progress_bar(f"Downloading {name}") as report:
            download(DATASETS[name], folder, extras=arguments.extras, mirror=arguments.mirror, report=report)
        print(folder)
    return 0


def _with_parts(names: list[str]) -> list[str]:
    """The sets themselves, and those that they are made of instead of a merged one."""
    return [part for name in names for part in (DATASETS[name].parts or (name,))]


# ---------------------------------------------------------------------- prepare


def _add_prepare(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from common.data.prepare import OWN

    prepare = kinds.add_parser(
        "prepare", help="raw files -> rows/SPLIT.jsonl and corpus or databases, as a run reads them"
    )
    prepare.add_argument(
        "name", metavar="NAME", choices=[*DATASETS, OWN.name], help=f"a set of the list, or `{OWN.name}`"
    )
    prepare.add_argument("--raw", type=Path, help="folder of its raw files (own: or one .jsonl file)")
    prepare.add_argument("--out", type=Path, help="folder to make")
    prepare.add_argument("--seed", type=int, default=0, help="of the validation rows, where they are cut from train")
    prepare.add_argument("--dev-rows", type=int, help="how many are cut; default: a tenth, 500 at most")
    _add_folder(prepare)
    prepare.set_defaults(handler=_prepare)


def _prepare(arguments: argparse.Namespace) -> int:
    from common.data.prepare import OWN, prepare

    places = _places(arguments)
    dataset = OWN if arguments.name == OWN.name else DATASETS[arguments.name]
    if dataset is OWN and arguments.raw is None:
        raise LaunchError("name your file or folder: deepretrieval data prepare own --raw FILE --out FOLDER")
    raw = arguments.raw or (places.root if dataset.parts else places.raw(dataset.name))
    out = arguments.out or places.prepared(dataset.name)
    with progress_bar(f"Preparing {dataset.name}") as report:
        prepared = prepare(
            dataset,
            raw,
            out,
            seed=arguments.seed,
            dev_rows=arguments.dev_rows,
            say=lambda text: report(0.0, text),
        )
    for line in describe(prepared):
        print(line, file=sys.stderr)
    print(out)
    return 0


def describe(prepared: Prepared) -> list[str]:
    """What became of a set, in lines for people."""
    lines = [f"{split}: {rows:,} rows" for split, rows in prepared.rows.items()]
    lines += [f"{split} was cut from train (seed {seed})" for split, seed in prepared.cut.items()]
    for pair, rows in prepared.shared.items():
        split, _, keeper = pair.partition("/")
        lines.append(f"{rows} rows of {split} ask what {keeper} asks: taken out of {split}")
    lines += [
        f"{rows} rows of {split} stand in two of its files: taken once" for split, rows in prepared.repeated.items()
    ]
    lines += [f"{rows} rows left out: {reason}" for reason, rows in prepared.left_out.items()]
    if prepared.prompts:
        lines.append(f"{prepared.prompts} rows carry the original's prompt")
    return lines + list(prepared.notes)


# ---------------------------------------------------------------------- index


def _add_index(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    index = kinds.add_parser("index", help="build a search index ahead of time; says first what it will cost")
    index.add_argument("name", nargs="?", metavar="NAME", choices=[*DATASETS], help="a prepared set")
    index.add_argument("--corpus", type=Path, help="any other folder with corpus.jsonl")
    index.add_argument("--engine", dest="kind", choices=sorted(SECTIONS), required=True)
    index.add_argument("--estimate", action="store_true", help="only say what it will cost")
    index.add_argument("--sample", type=int, default=2000, help="documents that are measured for it; 0: no estimate")
    _add_folder(index)
    for name, section in SECTIONS.items():
        add_section(index, index.add_argument_group(f"{name} (search.{name} of a config)"), section)
    index.set_defaults(handler=_index)


def _index(arguments: argparse.Namespace) -> int:
    from deploy.index_building import build_index, estimate, require_room

    if (arguments.name is None) == (arguments.corpus is None):
        raise LaunchError("name one thing to index: a prepared data set, or a folder with --corpus")
    corpus = arguments.corpus or _places(arguments).prepared(arguments.name)
    settings, cache = section_of(arguments), cache_folder() / "indexes"
    if arguments.sample:
        cost = estimate(arguments.kind, settings, corpus, arguments.sample)
        print(f"{arguments.kind} index of {cost}; what the cache holds already is not built again", file=sys.stderr)
        if arguments.estimate:
            return 0
        require_room(cost, cache)
    began = time.monotonic()
    with progress_bar(f"Building the {arguments.kind} index") as report:
        version = build_index(
            arguments.kind,
            settings,
            corpus,
            cache,
            lambda done, total: report(done / max(total, 1), f"{done:,} of {total:,} documents"),
        )
    print(f"{version}: ready after {time.monotonic() - began:.0f} s", file=sys.stderr)
    print(cache)
    return 0
