"""All files of one data set of the catalogue."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from common.data.catalogue import Dataset, Source
from deploy.downloads.http_file import fetch_file
from deploy.downloads.hub import fetch_from_hub
from deploy.downloads.manifest import DownloadError, Manifest
from deploy.downloads.unpack import unpack

Report = Callable[[float, str], None]
"""Told the share done of the file at hand, and what is going on."""


def download(
    dataset: Dataset,
    folder: Path,
    *,
    extras: bool = False,
    mirror: bool = False,
    report: Report = lambda share, text: None,
) -> Manifest:
    """Fetch what is missing of a data set into its raw folder.

    Args:
        extras: also what is not needed: the original's rows with its own prompts. mirror: from the set's mirror.

    Raises:
        DownloadError: as `fetch_file` and `fetch_from_hub`; or a person has to fetch it, which the message describes.
    """
    if mirror and not dataset.mirrors:
        raise DownloadError(f"{dataset.name} has no mirror: leave --mirror out")
    folder.mkdir(parents=True, exist_ok=True)
    manifest = Manifest(folder)
    sources = dataset.mirrors if mirror else dataset.sources
    by_hand = [source for source in sources if source.kind == "by_hand"]
    for source in sources:
        if source.extra and not extras:
            continue
        if source.kind == "hub":
            report(0.0, f"{source.address} {' '.join(source.files)}")
            fetch_from_hub(source.address, source.files, manifest, source.folder)
        elif source.kind == "http":
            _over_http(source, manifest, report)
    if by_hand and not any(path.name != manifest.path.name for path in folder.iterdir()):
        source = by_hand[0]
        raise DownloadError(
            f"{dataset.name} cannot be fetched by a program: {source.note} ({source.address} -> {folder})"
        )
    return manifest


def _over_http(source: Source, manifest: Manifest, report: Report) -> None:
    name = source.address.rpartition("/")[2]
    if manifest.holds(name, source.address):
        report(1.0, f"{name} is here")
        return

    def progress(done: int, total: int) -> None:
        size = f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB" if total else f"{done / 1e6:,.0f} MB"
        report(done / total if total else 0.0, f"{name}: {size}")

    fetched = fetch_file(source.address, manifest.folder / name, md5=source.md5, progress=progress)
    if name.endswith(".zip"):
        report(1.0, f"{name}: unpacking")
        unpack(manifest.folder / name)
        fetched = msgspec.structs.replace(fetched, unpacked=True)
    manifest.note(name, fetched)
