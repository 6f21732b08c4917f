"""`deepretrieval train` and `launch`: every role of one run, watched, shown, and ended together.

The launcher decides nothing about training. It writes the resolved config and the keys, keeps the roles at their
wanted number wherever its `Site` runs them, and shows the fleet's state. Ctrl-C asks the learner for a checkpoint and
ends everything; `--resume` goes on from it.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from common.config import Config
from common.tasks.from_config import task_of
from common.tracking.progress import LiveProgress
from common.transport.keys import load_run_keys
from deploy.errors import LaunchError
from deploy.fleet import ELASTIC, Fleet, Outcome
from deploy.fleet_watch import FleetWatch
from deploy.report import print_report, write_report
from deploy.role_specs import RoleSpecs, endpoint_of
from deploy.run_setup import prepare_folder, run_folder, with_addresses
from deploy.search_engine import check_engine, measure_baselines, start_server
from deploy.sites import Site
from deploy.supervisor import Supervisor

logger = logging.getLogger(__name__)

CHECKPOINT_GRACE_S = 60.0
STOP_GRACE_S = 3.0
FINISH_GRACE_S = 10.0
BASELINES_GRACE_S = 60.0
PLACED_WITHIN_S = 30.0


class LaunchedRun:
    """One run, from its first process to its last.

    Args:
        config: with real paths (see `deploy.assets`).
        engine: the inference engine that will be used.
        resume: go on from the newest checkpoint in the run's folder.
        site: where the roles run.
    """

    def __init__(self, config: Config, engine: str, resume: bool, console: Console, site: Site) -> None:
        self._own_server = config.search.url is None and config.search.cache.mode != "replay"
        self._config = with_addresses(config, engine, site)
        self.folder = run_folder(config)
        self._metric = task_of(config).metric
        self._engine = engine
        self._resume = resume
        self._console = console
        self._site = site
        self._interrupted = asyncio.Event()
        self._hurry = asyncio.Event()
        self._baselines: dict[str, float] = {}
        self._warning = ""
        self._watch: FleetWatch | None = None
        learner, actors = config.learner.processes, config.actor.count
        specs = RoleSpecs(self._config, self.folder, site.host, resume, site.gpu_share(learner, actors))
        self._supervisor = Supervisor(Fleet(learner), lambda kind, name: site.role(specs.of(kind, name)), self._warn)

    async def run(self) -> int:
        """The whole run; returns the exit status (130 where it was interrupted).

        Raises:
            LaunchError, EngineUnavailable, OSError: it cannot start or go on.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._interrupt)
        prepare_folder(self.folder, self._config, self._resume)
        self._site.check(self._needed_everywhere())
        try:
            with LiveProgress(self.folder.metrics, self._snapshot, console=self._console):
                outcome = await self._until_end()
                if outcome == "failed":
                    self._warning = f"{self._supervisor.failure}; the learner writes a checkpoint"
                    await self._end_learner()
        finally:
            await self._supervisor.stop_all(STOP_GRACE_S)
        if outcome == "completed":
            print_report(write_report(self.folder.path, {"engine": self._engine}), self._console)
            return 0
        if outcome == "failed":
            raise LaunchError(f"{self._supervisor.failure}{self._how_to_mend()}")
        self._say_how_to_go_on()
        return 130

    # ------------------------------------------------------------------ the run

    def _interrupt(self) -> None:
        """Ctrl-C: once asks for a checkpoint, twice does not wait for it."""
        (self._hurry if self._interrupted.is_set() else self._interrupted).set()

    async def _until_end(self) -> Outcome:
        work = asyncio.create_task(self._start_and_supervise())
        interruption = asyncio.create_task(self._interrupted.wait())
        try:
            await asyncio.wait({work, interruption}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
        finally:
            for task in (work, interruption):
                task.cancel()
            await asyncio.gather(work, interruption, return_exceptions=True)
        self._warning = "stopping: the learner writes a checkpoint; Ctrl-C again does not wait for it"
        await self._end_learner()
        return "stopped"

    async def _end_learner(self) -> None:
        """Wait for its checkpoint, but not against the user's will."""
        saving = asyncio.create_task(self._supervisor.stop("learner", CHECKPOINT_GRACE_S))
        hurry = asyncio.create_task(self._hurry.wait())
        try:
            await asyncio.wait({saving, hurry}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for unfinished in (saving, hurry):
                unfinished.cancel()
            await asyncio.gather(saving, hurry, return_exceptions=True)

    async def _start_and_supervise(self) -> Outcome:
        url = self._config.search.url
        assert url is not None
        fleet = self._supervisor.fleet
        self._watch = FleetWatch(
            self._supervisor,
            endpoint_of(self._config),
            load_run_keys(self.folder.keys, "monitor"),
            url if self._own_server else None,
            self.folder.path,
        )
        watching = asyncio.create_task(self._watch.run())
        try:
            await (start_server(self._supervisor, url) if self._own_server else check_engine(self._config))
            await self._start_home_roles()
            fleet.scale("actor", self._config.actor.count)  # first: importing and starting vLLM takes longest
            fleet.scale("rewarder", self._config.rewarder.count)
            return await self._supervise()
        finally:
            await _end([watching])

    async def _start_home_roles(self) -> None:
        """Those that can run in one place only come before the others, who could take that place."""
        names = [self._supervisor.fleet.add("broker", "broker"), self._supervisor.fleet.add("learner", "learner")]
        deadline = time.monotonic() + PLACED_WITHIN_S
        while time.monotonic() < deadline:
            self._supervisor.look(time.monotonic())
            roles = [self._supervisor.roles.get(name) for name in names]
            if all(role is not None and not role.note for role in roles):
                return
            await asyncio.sleep(0.05)

    async def _supervise(self) -> Outcome:
        """Until the learner has ended for good."""
        assert self._watch is not None
        following = asyncio.create_task(self._watch.follow_wishes())
        measuring = asyncio.create_task(self._measure_baselines())
        try:
            outcome = await self._supervisor.run()
            if outcome == "completed":
                await self._let_roles_finish()
                await asyncio.wait([measuring], timeout=BASELINES_GRACE_S)
            return outcome
        finally:
            await _end([following, measuring])

    async def _let_roles_finish(self) -> None:
        """The learner has announced the end: actors and rewarders leave by themselves."""
        deadline = time.monotonic() + FINISH_GRACE_S
        names = [member.name for member in self._supervisor.fleet.members.values() if member.kind in ELASTIC]
        roles = [self._supervisor.roles[name] for name in names if name in self._supervisor.roles]
        while any(role.running for role in roles) and time.monotonic() < deadline:
            await asyncio.sleep(0.1)

    def _needed_everywhere(self) -> list[Path]:
        """What every role must see under the same path."""
        assert self._config.model.path is not None
        return [self.folder.config, self.folder.keys / "public.json", Path(self._config.model.path) / "config.json"]

    def _how_to_mend(self) -> str:
        saved = self.folder.checkpoints.is_dir() and any(self.folder.checkpoints.iterdir())
        return "; when that is mended, the same command with --resume goes on" if saved else ""

    def _say_how_to_go_on(self) -> None:
        learner = self._supervisor.roles.get("learner")
        saved = learner is not None and learner.returncode in (0, 130)
        what = "Interrupted and saved" if saved else "Interrupted; steps after the last checkpoint are lost"
        steps = f"runs on with the same command and --resume (checkpoints in {self.folder.checkpoints})"
        self._console.print(f"{what}; {steps}", soft_wrap=True, highlight=False)

    def _warn(self, line: str) -> None:
        self._warning = line
        logger.warning(line)

    async def _measure_baselines(self) -> None:
        """While the engines start."""
        if self._own_server:  # else: thousands of requests that nobody asked for, on a quota that training needs
            self._baselines = await measure_baselines(self._config, self.folder)

    # ------------------------------------------------------------------ display

    def _snapshot(self) -> Mapping[str, Any]:
        watch = self._watch
        live = {}
        if watch is not None and watch.fleet is not None:
            live = {f"queue/{name}": stage.queued + stage.leased for name, stage in watch.fleet.stages.items()}
        return {
            "run": self._config.run.name,
            "engine": self._engine,
            "device": "GPU" if shutil.which("nvidia-smi") else "CPU",
            "steps": self._config.learner.steps,
            "metric": self._metric,
            "baselines": self._baselines,
            "roles": [state.snapshot() for state in watch.states] if watch is not None else [],
            "warning": self._warning,
            "live": live,
        }


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    """Cancel what runs beside the run; an error in it is logged, and ends nothing."""
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Exception):
            logger.error("a part of the launcher failed", exc_info=result)
