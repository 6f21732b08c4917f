"""`deepretrieval train`: every role of one run on this machine, watched, shown, and ended together.

The launcher decides nothing about training. It prepares corpus and model, writes the resolved config and the
keys, starts the processes, restarts actors, rewarders and broker that die, and shows the fleet's state. Ctrl-C
asks the learner for a checkpoint and ends everything; `--resume` goes on from it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import signal
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from common.config import Config, to_yaml
from common.data.beir import read_split
from common.messages import StatusReply
from common.run_folder import RunFolder
from common.statistics import bootstrap_interval
from common.tracking.heldout import write_baselines
from common.tracking.progress import LiveProgress
from common.transport.client import BrokerClient, BrokerUnreachableError
from common.transport.keys import create_run_keys, load_run_keys
from deploy.errors import LaunchError
from deploy.processes import KEEP_MEMORY, RoleProcess, stop_all
from deploy.report import print_report, write_report
from deploy.role_states import role_states
from deploy.roles import pubmed_settings

logger = logging.getLogger(__name__)

STATUS_EVERY_S = 1.0
CHECKPOINT_GRACE_S = 10.0
STOP_GRACE_S = 3.0
FINISH_GRACE_S = 10.0
SERVER_START_S = 120.0


class LocalRun:
    """One run on this machine.

    Args:
        config: with real paths (see `deploy.assets`) and the engine that will be used.
        resume: go on from the newest checkpoint in the run's folder.
    """

    def __init__(self, config: Config, engine: str, resume: bool, console: Console) -> None:
        self.folder = RunFolder(Path(config.run.root) / config.run.name)
        self._engine = engine
        self._resume = resume
        self._console = console
        self._interrupted = asyncio.Event()
        self._processes: list[RoleProcess] = []
        self._fleet: StatusReply | None = None
        self._baselines: dict[str, float] = {}
        self._warning = ""
        self._own_server = config.search.url is None
        self._config = self._with_addresses(config)

    async def run(self) -> int:
        """The whole run; returns the exit status (130 where it was interrupted).

        Raises:
            LaunchError, EngineUnavailable, OSError: it cannot start or go on.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._interrupted.set)
        self._prepare_folder()
        try:
            with LiveProgress(self.folder.metrics, self._snapshot, console=self._console):
                completed = await self._supervised()
        finally:
            await stop_all(self._processes, STOP_GRACE_S)
        if not completed:
            steps = f"runs on with: deepretrieval train … --resume (checkpoint in {self.folder.checkpoints})"
            self._console.print(f"Interrupted and saved; {steps}", soft_wrap=True, highlight=False)
            return 130
        report = write_report(self.folder.path, {"engine": self._engine})
        print_report(report, self._console)
        return 0

    # ------------------------------------------------------------------ preparation

    def _with_addresses(self, config: Config) -> Config:
        """Fill in the ports and URLs that the config leaves open."""
        search, broker = config.search, config.broker
        if search.url is None:
            port = search.port or free_port("127.0.0.1")
            search = search.model_copy(update={"url": f"http://127.0.0.1:{port}", "port": port})
        if broker.port == 0:
            broker = broker.model_copy(update={"port": free_port(broker.host)})
        actor = config.actor.model_copy(update={"engine": self._engine})
        return config.model_copy(update={"search": search, "broker": broker, "actor": actor})

    def _prepare_folder(self) -> None:
        self.folder.path.mkdir(parents=True, exist_ok=True)
        if not self._resume:
            self._set_earlier_run_aside()
        self.folder.config.write_text(to_yaml(self._config))
        create_run_keys(self.folder.keys)

    def _set_earlier_run_aside(self) -> None:
        """A new run under an old name: keep the old one's checkpoints and results out of its way."""
        earlier = self.folder.path / "previous"
        for name in (
            "checkpoints",
            "heldout",
            "plots",
            "rewrites.md",
            "metrics.jsonl",
            "samples.jsonl",
            "summary.json",
        ):
            old, kept = self.folder.path / name, earlier / name
            if old.exists():
                earlier.mkdir(exist_ok=True)
                if kept.is_dir():
                    shutil.rmtree(kept)
                old.replace(kept)
        for log in self.folder.logs.glob("*.log"):
            log.unlink()

    @property
    def _endpoint(self) -> str:
        return f"tcp://{self._config.broker.host}:{self._config.broker.port}"

    # ------------------------------------------------------------------ processes

    def _role(self, name: str, role: str, *arguments: str, threads: int = 1) -> RoleProcess:
        environment = {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        if role in ("learner", "actor"):
            environment |= KEEP_MEMORY
        if role in ("actor", "rewarder", "learner"):
            arguments = ("--connect", self._endpoint, *arguments)
        process = RoleProcess(
            name, (role, str(self.folder.config), *arguments), self.folder.logs / f"{name}.log", environment
        )
        self._processes.append(process)
        return process

    async def _supervised(self) -> bool:
        supervision = asyncio.create_task(self._start_and_supervise())
        interruption = asyncio.create_task(self._interrupted.wait())
        try:
            await asyncio.wait({supervision, interruption}, return_when=asyncio.FIRST_COMPLETED)
            if supervision.done():
                return supervision.result()
            await self._stop_learner()
            return False
        finally:
            for task in (supervision, interruption):
                task.cancel()
            await asyncio.gather(supervision, interruption, return_exceptions=True)

    async def _start_and_supervise(self) -> bool:
        config = self._config
        if self._own_server:
            await self._start_search_server()
        else:
            await self._check_search_engine()
        broker = self._role("broker", "broker", "--port", str(config.broker.port))
        await broker.start()
        # Actors first: importing and starting vLLM takes longest.
        for index in range(config.actor.count):
            await self._role(
                f"actor-{index}", "actor", "--name", f"actor-{index}", threads=config.actor.threads
            ).start()
        learner = self._learner()
        await learner.start()
        for index in range(config.rewarder.count):
            await self._role(f"rewarder-{index}", "rewarder", "--name", f"rewarder-{index}").start()
        async with contextlib.AsyncExitStack() as stack:
            monitor = BrokerClient(self._endpoint, load_run_keys(self.folder.keys, "monitor"), "monitor", "launcher")
            await monitor.start()
            stack.push_async_callback(monitor.close)
            watching = asyncio.create_task(self._watch_fleet(monitor))
            measuring = asyncio.create_task(self._measure_baselines())
            stack.callback(watching.cancel)
            stack.callback(measuring.cancel)
            await self._until_learner_ends(learner)
            await measuring
            await self._let_roles_finish()
        return True

    def _learner(self) -> RoleProcess:
        section = self._config.learner
        resume = ("--resume",) if self._resume else ()
        if section.processes == 1:
            return self._role("learner", "learner", *resume, threads=section.threads)
        ranks = ("--processes", str(section.processes))
        return self._role("learner", "learner", *resume, *ranks, threads=section.threads)

    async def _until_learner_ends(self, learner: RoleProcess) -> None:
        """Wait for the learner; restart whatever else dies meanwhile (status 0: it left politely)."""
        while learner.running:
            for process in self._processes:
                if process is not learner and process.returncode not in (None, 0):
                    await self._revive(process)
            await asyncio.sleep(0.2)
        if learner.returncode != 0:
            raise LaunchError(
                f"the learner ended with status {learner.returncode}: {learner.last_words()} (log: {learner.log})"
            )

    async def _revive(self, process: RoleProcess) -> None:
        words = process.last_words()
        if not process.may_restart():
            raise LaunchError(f"{process.name} dies again and again: {words} (log: {process.log})")
        self._warning = f"{process.name} ended with status {process.returncode} and is started again: {words}"
        logger.warning(self._warning)
        await process.start()

    async def _let_roles_finish(self) -> None:
        """The learner has announced the end: actors and rewarders leave by themselves."""
        deadline = time.monotonic() + FINISH_GRACE_S
        roles = [p for p in self._processes if p.name.startswith(("actor", "rewarder"))]
        while any(process.running for process in roles) and time.monotonic() < deadline:
            await asyncio.sleep(0.1)

    async def _stop_learner(self) -> None:
        self._warning = "stopping: the learner writes a checkpoint"
        for process in self._processes:
            if process.name == "learner" and process.running:
                await process.stop(CHECKPOINT_GRACE_S)

    # ------------------------------------------------------------------ the search engine

    async def _start_search_server(self) -> None:
        search = self._config.search
        quota = search.quota
        limits = ("--quota", str(quota.requests), "--window", str(quota.window_s)) if quota else ()
        process = RoleProcess(
            "search-server",
            (
                *("search-server", "pubmed", "--corpus", self._config.data.corpus),
                *("--port", str(search.port), "--latency-ms", str(search.latency_ms), *limits),
            ),
            self.folder.logs / "search-server.log",
        )
        self._processes.append(process)
        await process.start()
        deadline = time.monotonic() + SERVER_START_S
        while not await _accepts("127.0.0.1", search.port):
            if not process.running:
                raise LaunchError(f"the search server did not start: {process.last_words()}")
            if time.monotonic() > deadline:
                raise LaunchError(f"the search server is not up after {SERVER_START_S:.0f} s (log: {process.log})")
            await asyncio.sleep(0.05)

    async def _check_search_engine(self) -> None:
        """One cheap request before anything expensive starts.

        Raises:
            EngineUnavailable: nobody answers at search.url.
        """
        from rewarders.engines.pubmed import PubMedEngine

        async with PubMedEngine(pubmed_settings(self._config)) as engine:
            await engine.check()

    async def _measure_baselines(self) -> None:
        """Recall of the fixed rewrites of the held-out requests, while the engines start."""
        from rewarders.baselines import evaluate_baselines
        from rewarders.engines.pubmed import PubMedEngine

        data, search = self._config.data, self._config.search
        if not self._own_server:
            return  # thousands of requests that nobody asked for, on a quota that training needs
        rows = read_split(data.corpus, data.heldout_split)[: data.heldout_limit]
        async with PubMedEngine(pubmed_settings(self._config)) as engine:
            recalls = await evaluate_baselines(rows, engine, data.corpus, retmax=search.retmax, sort=search.sort)
        self.folder.heldout.mkdir(parents=True, exist_ok=True)
        write_baselines(self.folder.heldout / "baselines.json", recalls)
        self._baselines = {name: bootstrap_interval(values).mean for name, values in recalls.items()}

    # ------------------------------------------------------------------ display

    async def _watch_fleet(self, monitor: BrokerClient) -> None:
        while True:
            with contextlib.suppress(BrokerUnreachableError):
                self._fleet = await monitor.fleet_status()
            await asyncio.sleep(STATUS_EVERY_S)

    def _snapshot(self) -> Mapping[str, Any]:
        live = {}
        if self._fleet is not None:
            live = {f"queue/{name}": stage.queued + stage.leased for name, stage in self._fleet.stages.items()}
        return {
            "run": self._config.run.name,
            "engine": self._engine,
            "device": "GPU" if shutil.which("nvidia-smi") else "CPU",
            "steps": self._config.learner.steps,
            "baselines": self._baselines,
            "roles": role_states(self._processes, self._fleet),
            "warning": self._warning,
            "live": live,
        }


def free_port(host: str) -> int:
    """A port nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


async def _accepts(host: str, port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection(host, port)
    except OSError:
        return False
    writer.close()
    return True
