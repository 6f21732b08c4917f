"""Where search results are kept, as the configuration describes it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from common.config import Config
from common.config.schema import CacheConfig
from common.run_folder import RunFolder
from deploy.errors import LaunchError

if TYPE_CHECKING:
    from rewarders.cache import SearchCache
    from rewarders.cache.recording import RecordingEngine, ReplayEngine
    from rewarders.cache.shared import FleetResults
    from rewarders.engines.base import SearchEngine

REMOTE = ("pubmed", "ctgov")  # reached by URL; the others are local
_CORPUS_FILE = "corpus.jsonl"


def cache_settled(config: Config, folder: RunFolder) -> CacheConfig:
    """The cache section with folder and source, which the launcher knows best.

    Raises:
        LaunchError: results are to outlive the run, but nothing says for sure what is searched.
    """
    search = config.search
    cache, kind = search.cache, search.engine
    updates: dict[str, str] = {}
    if cache.mode != "memory":
        named = cache.folder and Path(os.path.expandvars(cache.folder)).expanduser().resolve()
        updates["folder"] = str(named or folder.searches)
    if cache.mode == "disk" and cache.source is None and kind != "sqlite":  # whose answers are no searches
        if kind not in REMOTE or search.url is None:
            updates["source"] = f"corpus {_fingerprint(Path(config.data.corpus))}"
        elif urlsplit(search.url).hostname in ("localhost", "127.0.0.1", "::1"):
            raise LaunchError(
                f"search.cache.mode=disk with search.url={search.url}: another corpus may be served there tomorrow; "
                "name what it serves as search.cache.source"
            )
    return cache.model_copy(update=updates)


def source_of(config: Config) -> str:
    """What a run searches, in the keys of its results."""
    search = config.search
    place = search.cache.source or (without_user(search.url or "") if search.engine in REMOTE else config.data.corpus)
    settings = {"bm25": search.bm25, "dense": search.dense}.get(search.engine)
    return f"{search.engine} {place}{'' if settings is None else ' ' + settings.model_dump_json()}"


def without_user(url: str) -> str:
    """A URL that may be written to disk."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl().rstrip("/")


def search_cache_of(config: Config, fleet: FleetResults | None = None) -> SearchCache:
    """The cache of one rewarder. fleet: shares with other rewarders, where that is wanted and of use."""
    from rewarders.cache import SearchCache
    from rewarders.cache.disk import DiskResults

    section = config.search.cache
    # Without a quota, asking the engine costs no more than asking the broker.
    wanted = config.search.quota is not None if section.share is None else section.share
    disk = None
    if section.mode == "disk":
        disk = DiskResults(_folder(config), max_bytes=section.disk_mib << 20, max_age_s=section.max_age_h * 3600.0)
    return SearchCache(
        config.rewarder.cache_entries,
        source=source_of(config),
        disk=disk,
        fleet=fleet if wanted and section.mode != "replay" else None,
    )


def recording_engine(config: Config, engine: SearchEngine) -> RecordingEngine:
    """`engine`, recorded."""
    from rewarders.cache.recording import RecordingEngine

    return RecordingEngine(engine, _folder(config), config.search.engine)


def replay_engine(config: Config) -> ReplayEngine:
    """The recording in the place of an engine."""
    from rewarders.cache.recording import ReplayEngine

    return ReplayEngine(_folder(config), config.search.engine)


def _folder(config: Config) -> Path:
    """Settled by the launcher; else as it would settle it."""
    named = config.search.cache.folder
    return Path(named) if named else RunFolder(Path(config.run.root) / config.run.name).searches


def _fingerprint(corpus: Path) -> str:
    """SHA-256, 32 digits, of a BEIR corpus, or of all files of another folder."""
    digest = hashlib.sha256()
    beir = corpus / _CORPUS_FILE
    for path in [beir] if beir.is_file() else sorted(path for path in corpus.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(corpus)}\n".encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]
