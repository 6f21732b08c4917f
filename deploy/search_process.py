"""A search server of a command's own, for as long as the command needs it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from common.config import Config
from common.run_folder import RunFolder
from deploy.engines import has_server
from deploy.errors import LaunchError
from deploy.fleet_watch import accepts
from deploy.processes import LocalRole, RoleSpec
from deploy.search_cache import cache_settled
from deploy.search_engine import SERVER, START_WITHIN_S
from deploy.search_server_command import options_of
from deploy.sites import LOOPBACK, free_port

_STOP_GRACE_S: Final = 3.0
_POLL_S: Final = 0.05


def needs_own_server(config: Config) -> bool:
    """Whether a run of this config searches a server that has to be started first."""
    return config.search.url is None and has_server(config) and config.search.cache.mode != "replay"


@asynccontextmanager
async def own_search_server(config: Config, log: Path) -> AsyncIterator[Config]:
    """Run the server over `data.corpus`, where one is needed; gives the config with its URL.

    Raises:
        LaunchError: it does not start; the message has its last words.
    """
    if not needs_own_server(config):
        yield config
        return
    port = config.search.port or free_port(LOOPBACK)
    arguments = ("search-server", *options_of(config), "--host", LOOPBACK, "--port", str(port))
    server = LocalRole(RoleSpec(SERVER, arguments, log, {"PYTHONUNBUFFERED": "1"}))
    await server.start()
    try:
        await _until_it_serves(server, port)
        search = config.search.model_copy(update={"url": f"http://{LOOPBACK}:{port}", "port": port})
        yield config.model_copy(update={"search": search})
    finally:
        await server.stop(_STOP_GRACE_S)


@asynccontextmanager
async def searchable(config: Config, folder: Path, log: Path) -> AsyncIterator[Config]:
    """The config as an answerer can be made of it: its own server runs where one is needed, the cache knows its folder.

    Args:
        folder: where a cache or recording that names none is kept. log: of the server.

    Raises:
        LaunchError: the server does not start, or the cache cannot tell what is searched.
    """
    async with own_search_server(config, log) as served:
        cache = cache_settled(served, RunFolder(folder.resolve()))
        yield served.model_copy(update={"search": served.search.model_copy(update={"cache": cache})})


def without_own_server(config: Config) -> Config:
    """The config of a run as it was before its launcher gave its own server an address; others are left alone.

    A run's config.yaml names that server, which ended with the run. Its port stands there twice.
    """
    search = config.search
    if search.port == 0 or search.url is None or not search.url.endswith(f":{search.port}"):
        return config
    return config.model_copy(update={"search": search.model_copy(update={"url": None, "port": 0})})


async def _until_it_serves(server: LocalRole, port: int) -> None:
    deadline = time.monotonic() + START_WITHIN_S
    while not await accepts(LOOPBACK, port):
        if not server.running:
            raise LaunchError(f"the search server did not start: {server.last_words()} (log: {server.log})")
        if time.monotonic() > deadline:
            raise LaunchError(f"the search server is not up after {START_WITHIN_S:.0f} s (log: {server.log})")
        await asyncio.sleep(_POLL_S)
