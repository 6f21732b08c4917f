"""What the launcher has to do with the search engine of a run: start or check it, and measure the fixed rewrites."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from common.config import Config
from common.data.rows import read_requests
from common.run_folder import RunFolder
from common.statistics import bootstrap_interval
from common.tracking.heldout import write_baselines
from deploy.engines import engine_of
from deploy.errors import LaunchError
from deploy.fleet_watch import accepts
from deploy.supervisor import Supervisor

if TYPE_CHECKING:
    from rewarders.baselines import QueryForm

logger = logging.getLogger(__name__)

SERVER = "search-server"
START_WITHIN_S = 120.0  # an index may have to be built


async def start_server(supervisor: Supervisor, url: str) -> None:
    """Start the run's own search server and wait until it serves.

    Raises:
        LaunchError: it ended, or takes too long.
    """
    address = urlsplit(url)
    supervisor.fleet.add("search-server", SERVER)
    deadline = time.monotonic() + START_WITHIN_S
    while True:
        supervisor.look(time.monotonic())
        role = supervisor.roles.get(SERVER)
        if role is not None and role.returncode is not None:
            raise LaunchError(f"the search server did not start: {role.last_words()} (log: {role.log})")
        if role is not None and role.running and await accepts(address.hostname or "", address.port or 80):
            return
        if time.monotonic() > deadline:
            raise LaunchError(f"the search server is not up after {START_WITHIN_S:.0f} s (see logs/{SERVER}.log)")
        await asyncio.sleep(0.05)


async def check_engine(config: Config) -> None:
    """One cheap request before anything expensive starts.

    Raises:
        EngineUnavailable: nobody answers at search.url.
    """
    async with engine_of(config) as engine:
        await engine.check()


async def measure_baselines(config: Config, folder: RunFolder) -> dict[str, float]:
    """Mean of the task's metric over the held-out requests for each fixed rewrite, written to the run folder too; {}
    if it cannot be measured, or if the engine is none that takes rewrites of a request (SQLite)."""
    from common.tasks.from_config import task_of
    from rewarders.answerers.search import SearchAnswerer
    from rewarders.baselines import evaluate_baselines
    from rewarders.engines.base import EngineUnavailable
    from rewarders.retry import Retrier, RetryPolicy

    form = query_form(config)
    if form is None:
        return {}
    data, search = config.data, config.search
    rows = read_requests(data.corpus, data.heldout_split)[: data.heldout_limit]
    # Nobody waits for these, so they may wait for a server that is restarted, or told to fail.
    patient = Retrier(RetryPolicy(attempts=20, budget_ratio=1.0, budget_burst=1000.0))
    answerer = SearchAnswerer(task_of(config), engine_of(config), sort=search.sort, retrier=patient)
    try:
        async with answerer:
            measured = await evaluate_baselines(rows, answerer, data.corpus, form)
    except (EngineUnavailable, ValueError) as error:  # a figure to compare with, not a reason to end the run
        logger.warning("the baselines could not be measured: %s", error)
        return {}
    folder.heldout.mkdir(parents=True, exist_ok=True)
    write_baselines(folder.heldout / "baselines.json", measured)
    return {name: bootstrap_interval(values).mean for name, values in measured.items()}


def query_form(config: Config) -> QueryForm | None:
    """What the run's engine makes of a query; None where it takes none in words."""
    match config.search.engine:
        case "pubmed" | "ctgov":
            return "boolean"
        case "bm25":
            return "boolean" if config.search.bm25.syntax == "boolean" else "words"
        case "dense":
            return "words"
        case "sqlite":
            return None
