"""Indexes built ahead of time, in the cache where a search server of the same settings will find them.

What an index will cost is measured first, on documents from all over the corpus: an index of a few and one of some more
tell what starting costs and what a document costs.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from common.config.section import Section
from common.data.beir import CORPUS_FILE, DataError

if TYPE_CHECKING:
    from rewarders.servers.index_cache import Progress
    from rewarders.servers.retrieval.backend import Backend

Engine = Literal["bm25", "dense"]

SAMPLE: Final = 2000
_FEW: Final = 50


class Cost(msgspec.Struct, frozen=True):
    """Of an index over `documents`, from `sample` of them: about so many bytes and seconds. 0 in sample: the corpus is
    so small that nothing was measured."""

    documents: int
    sample: int
    bytes: int
    seconds: float

    def __str__(self) -> str:
        if not self.sample:
            return f"{self.documents:,} documents: a matter of a minute"
        return (
            f"{self.documents:,} documents: about {_size(self.bytes)} and {_duration(self.seconds)} "
            f"(measured on {self.sample:,})"
        )


def make_backend(engine: Engine, settings: Section, corpus: Path, cache: Path | None, progress: Progress) -> Backend:
    """The search server's own backend, not yet started. settings: the section search.bm25 or search.dense."""
    if engine == "bm25":
        from rewarders.servers.retrieval.lucene import LuceneBackend, LuceneSettings

        return LuceneBackend(corpus, LuceneSettings(**settings.model_dump()), cache, progress)
    from rewarders.servers.retrieval.dense import DenseBackend, DenseSettings

    return DenseBackend(corpus, DenseSettings(**settings.model_dump()), cache, progress)


def build_index(engine: Engine, settings: Section, corpus: Path, cache: Path, progress: Progress) -> str:
    """Build the index, or go on with what an interrupted call left (dense: passages in blocks); opens it once.

    Returns the version that a server over it will give.

    Raises:
        DataError: the corpus is missing or broken. SearchServerError: the engine cannot start.
    """
    return asyncio.run(_opened(make_backend(engine, settings, corpus, cache, progress)))


def estimate(engine: Engine, settings: Section, corpus: Path, sample: int = SAMPLE) -> Cost:
    """What `build_index` will cost where nothing of it is in the cache yet.

    Raises:
        DataError, SearchServerError: as `build_index`.
    """
    from rewarders.servers.index_cache import content_digest

    _, documents = content_digest(corpus / CORPUS_FILE)
    if documents <= 2 * sample:
        return Cost(documents, 0, 0, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        lines = list(_spread(corpus / CORPUS_FILE, sample))
        few = _measured(engine, settings, lines[:: max(1, len(lines) // _FEW)], Path(folder) / "few")
        more = _measured(engine, settings, lines, Path(folder) / "more")
    return extrapolated(documents, few, more)


def extrapolated(documents: int, few: Cost, more: Cost) -> Cost:
    """The line through two measurements, at `documents`."""
    step = more.documents - few.documents
    per_second = max(0.0, more.seconds - few.seconds) / step
    per_byte = max(0, more.bytes - few.bytes) / step
    beyond = documents - more.documents
    size, seconds = more.bytes + round(per_byte * beyond), more.seconds + per_second * beyond
    return Cost(documents, more.documents, size, seconds)


def require_room(cost: Cost, cache: Path) -> None:
    """Raises DataError where the disk of the cache has too little room for it."""
    place = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    if cost.bytes > free:
        message = f"{place} has {_size(free)} free, the index takes about {_size(cost.bytes)}: free some"
        raise DataError(f"{message}, or set DEEPRETRIEVAL_CACHE to another disk")


async def _opened(backend: Backend) -> str:
    try:
        await backend.start()
        return backend.version
    finally:
        await backend.close()


def _measured(engine: Engine, settings: Section, lines: list[bytes], folder: Path) -> Cost:
    (folder / "corpus").mkdir(parents=True)
    (folder / "corpus" / CORPUS_FILE).write_bytes(b"".join(lines))
    cache = folder / "cache"
    began = time.monotonic()
    build_index(engine, settings, folder / "corpus", cache, lambda done, total: None)
    size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    return Cost(len(lines), len(lines), size, time.monotonic() - began)


def _spread(path: Path, number: int) -> Iterator[bytes]:
    """Whole lines at even distances of the file, each document once."""
    size = path.stat().st_size
    seen: set[str] = set()
    with path.open("rb") as file:
        for place in range(number):
            file.seek(size * place // number)
            if place:
                file.readline()  # the rest of a line that began before
            line = file.readline()
            identifier = _id_of(line)
            if identifier is not None and identifier not in seen:
                seen.add(identifier)
                yield line if line.endswith(b"\n") else line + b"\n"


def _id_of(line: bytes) -> str | None:
    """None for what is no document: building the whole index will say what is wrong with it."""
    try:
        return str(json.loads(line)["_id"])
    except (ValueError, KeyError, TypeError):
        return None


def _size(number: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit != "GB" else f"{number:.1f} GB"
        number /= 1000
    return f"{number:.1f} TB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
