"""What has to be ready before the first role starts: addresses, the run folder, its keys."""

from __future__ import annotations

import shutil
from pathlib import Path

from common.config import Config, to_yaml
from common.run_folder import RunFolder
from common.transport.keys import create_run_keys
from deploy.engines import has_server
from deploy.errors import LaunchError
from deploy.search_cache import cache_settled
from deploy.sites import LOOPBACK, Site

_RESULTS = ("exports", "plots", "rewrites.md")  # beside those that `RunFolder` names


def with_addresses(config: Config, engine: str, site: Site) -> Config:
    """The config with the engine, hosts, ports, URLs and places that it leaves open.

    Raises:
        LaunchError: results are to be kept on disk, but nothing says what is searched.
    """
    search, broker = config.search, config.broker
    if not site.reaches(broker.host):
        broker = broker.model_copy(update={"host": site.host})
    if broker.port == 0:
        broker = broker.model_copy(update={"port": site.free_port(broker.host)})
    if search.url is None and has_server(config):
        host = LOOPBACK if site.reaches(LOOPBACK) else site.host
        port = search.port or site.free_port(host)
        search = search.model_copy(update={"url": f"http://{host}:{port}", "port": port})
    search = search.model_copy(update={"cache": cache_settled(config, run_folder(config))})
    actor = config.actor.model_copy(update={"engine": engine})
    return config.model_copy(update={"search": search, "broker": broker, "actor": actor})


def run_folder(config: Config) -> RunFolder:
    """The folder of a run, as an absolute path: its roles need not share the launcher's working directory."""
    return RunFolder((Path(config.run.root) / config.run.name).resolve())


def require_checkpoint(folder: RunFolder) -> None:
    """Before anything is built or started; whether it is undamaged, the learner finds out.

    Raises:
        LaunchError: there is nothing to resume.
    """
    if not any(folder.checkpoints.glob("step-*")):
        raise LaunchError(f"nothing to resume: {folder.checkpoints} holds no checkpoint; start without --resume")


def prepare_folder(folder: RunFolder, config: Config, resume: bool) -> None:
    """Write the resolved config and the keys; without `resume`, set an earlier run of this name aside.

    Raises:
        OSError: the disk refused. KeyFileError: no keys can be made.
    """
    folder.path.mkdir(parents=True, exist_ok=True)
    if not resume:
        _set_earlier_run_aside(folder, config.search.cache.mode == "record")
    folder.config.write_text(to_yaml(config))
    create_run_keys(folder.keys)


def _set_earlier_run_aside(folder: RunFolder, searches: bool) -> None:
    """searches: the recording too; else it stays, for it may be what is replayed."""
    earlier = folder.path / "previous"
    paths = (folder.checkpoints, folder.heldout, folder.metrics, folder.samples, folder.dispositions, folder.summary)
    recorded = (folder.searches,) if searches else ()
    for old in (*paths, *recorded, *(folder.path / name for name in _RESULTS)):
        kept = earlier / old.name
        if old.exists():
            earlier.mkdir(exist_ok=True)
            if kept.is_dir():
                shutil.rmtree(kept)
            old.replace(kept)
    for log in folder.logs.glob("*.log"):
        log.unlink()
