"""Roles on a Ray cluster, new or existing: each has a `RoleHost` that Ray restarts on another node if its own is lost.

Broker, learner and search server stay on the launcher's node, because everybody knows their addresses; actors and
rewarders are spread over all nodes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy.errors import LaunchError
from deploy.processes import RoleSpec
from deploy.ray_host import HostState, RoleHost, file_marks, port_on_this_node, unseen_files
from deploy.sites import LOOPBACK, Site, free_port
from deploy.supervisor import Role

logger = logging.getLogger(__name__)

POLL_S = 0.2
PLACED_WITHIN_S = 5.0  # after so long without a node, say so
CHECK_WITHIN_S = 60.0
LISTENS_WITHIN_S = 5.0
WORDS_CHARACTERS = 200
OBJECT_STORE_BYTES = 80 << 20  # no data goes through Ray: its smallest store will do
PASSED_ON = ("DEEPRETRIEVAL_CACHE", "DEEPRETRIEVAL_DEBUG", "WANDB_MODE")  # no secrets: Ray shows environments


class RaySite(Site):
    """A Ray cluster that this process is connected to. Made by `connect`."""

    def __init__(self, ray: Any, own_cluster: bool, client: bool) -> None:
        self._ray = ray
        self._own_cluster = own_cluster
        self._client = client
        self.home = ray.get_runtime_context().get_node_id()
        self._needed: list[tuple[str, str]] = []
        nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in self._nodes()}
        self.host = LOOPBACK if own_cluster else nodes[self.home]

    @classmethod
    def connect(cls, address: str) -> RaySite:
        """Join a cluster, or start one on this machine (`local`).

        Raises:
            LaunchError: Ray is not installed, or there is no such cluster.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        own, client = address == "local", address.startswith("ray://")
        _require_listener(address)
        if not own and _has_token():  # Ray does so by itself for `local` and `auto` only, and reads it when imported
            os.environ.setdefault("RAY_AUTH_MODE", "token")
        try:
            import ray
        except ModuleNotFoundError:
            raise LaunchError("Ray is not installed: pip install 'deepretrieval-async[ray]'") from None
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if own:
            quiet |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, ValueError, RuntimeError, ImportError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise LaunchError(
                f"no Ray cluster at {address}: {reason} (start one with `ray start --head`, or use --address local)"
            ) from None
        return cls(ray, own, client)

    # ------------------------------------------------------------------ as a site

    def role(self, spec: RoleSpec) -> Role:
        if self._own_cluster:  # all on this machine, as with `train`: nothing to be shared out
            spec = RoleSpec(**{**vars(spec), "cpus": 0.0})
        return RayRole(self._ray, spec, self._placement(spec), self._needed)

    def free_port(self, host: str) -> int:
        if not self._client:
            return free_port(host)
        return int(self._ray.get(self._at(self.home, port_on_this_node).remote(host)))

    def reaches(self, host: str) -> bool:
        return self._own_cluster or host not in (LOOPBACK, "localhost", "::1", "0.0.0.0", "*")

    def gpu_share(self, learner_ranks: int, actors: int) -> float:
        return gpu_share(float(self._ray.cluster_resources().get("GPU", 0.0)), learner_ranks + actors)

    def check(self, files: Sequence[Path]) -> None:
        self._needed = file_marks(files)
        nodes = {node["NodeID"]: node["NodeManagerHostname"] for node in self._nodes()}
        pending = {self._at(node, unseen_files).remote(self._needed): name for node, name in nodes.items()}
        for reference, name in pending.items():
            try:
                unseen = self._ray.get(reference, timeout=CHECK_WITHIN_S)
            except self._ray.exceptions.GetTimeoutError:
                raise LaunchError(f"the Ray node {name} does not answer within {CHECK_WITHIN_S:.0f} s") from None
            except self._ray.exceptions.RayError as error:
                raise LaunchError(
                    f"the Ray node {name} cannot run deepretrieval ({_first_line(error)}): install it there too"
                ) from None
            if unseen:
                raise LaunchError(
                    f"the Ray node {name} does not see {', '.join(unseen)} as this machine does: put the run folder "
                    "(run.root) and the model (model.path, $DEEPRETRIEVAL_CACHE) on a file system that all nodes share"
                )

    def close(self) -> None:
        self._ray.shutdown()

    # ------------------------------------------------------------------ inside

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self._ray.nodes() if node["Alive"]]

    def _at(self, node: str, function: Any) -> Any:
        """`function` as a Ray task that runs on this node and no other."""
        return self._ray.remote(function).options(num_cpus=0, scheduling_strategy=self._pin(node))

    def _pin(self, node: str) -> Any:
        return self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)

    def _placement(self, spec: RoleSpec) -> dict[str, Any]:
        return {
            "num_cpus": spec.cpus,
            "num_gpus": spec.gpus,
            "max_restarts": -1,
            "scheduling_strategy": self._pin(self.home) if spec.home else "SPREAD",
        }


class RayRole(Role):
    """A role whose process is kept by a `RoleHost` somewhere in the cluster."""

    def __init__(self, ray: Any, spec: RoleSpec, placement: dict[str, Any], needed: list[tuple[str, str]]) -> None:
        super().__init__(spec.name, spec.log)
        self._ray = ray
        passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        self._spec = RoleSpec(**{**vars(spec), "environment": {**passed, **spec.environment}})
        self._placement = placement
        self._needed = needed
        self._host: Any = None
        self._state: HostState | None = None
        self._asked_at = 0.0
        self._reached = False
        self._ended = False
        self._started = False
        self._polling: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._state, self._ended, self._reached = None, False, False
        self._started = True
        self._asked_at = time.monotonic()
        if self._polling is not None:
            self._polling.cancel()
        self._polling = asyncio.create_task(self._follow())

    @property
    def returncode(self) -> int | None:
        return self._state.returncode if self._ended and self._state is not None else None

    @property
    def running(self) -> bool:
        return self._started and not self._ended

    @property
    def pid(self) -> int | None:
        return self._state.pid if self._state is not None else None

    @property
    def where(self) -> str:
        return self._state.node if self._state is not None else ""

    @property
    def note(self) -> str:
        if self._ended or self._reached:
            return ""
        if self._state is not None:
            return "its node is lost, waits for another"
        if time.monotonic() - self._asked_at < PLACED_WITHIN_S:
            return "is being started"
        share = f"{self._placement['num_cpus']:g} CPUs, {self._placement['num_gpus']:g} GPUs"
        return f"waits for a node with {share} to spare"

    def error(self) -> str:
        return self._state.error if self._state is not None else ""

    def last_words(self) -> str:
        return self._state.words if self._state is not None else ""

    async def stop(self, grace_s: float) -> None:
        deadline = time.monotonic() + grace_s
        await self._ask("terminate")
        while self.running and self._reached and time.monotonic() < deadline:
            await asyncio.sleep(POLL_S)
        if self._host is not None:
            await self._ask("kill")
            if self._polling is not None:
                self._polling.cancel()
            self._ray.kill(self._host)
            self._host = None
        if not self._ended:
            self._ended = True
            self._state = self._state or HostState(0, None, None, "")

    async def _ask(self, method: str) -> None:
        """Call the host where it can be reached, and take note of its answer."""
        if self._host is None or not self._reached:
            return
        try:
            async with asyncio.timeout(POLL_S * 10):
                self._note_state(await getattr(self._host, method).remote())
        except (self._ray.exceptions.RayError, TimeoutError):
            self._reached = False

    async def _follow(self) -> None:
        """Have the process started, then look at it until it has ended."""
        errors = self._ray.exceptions
        while not self._ended:
            try:
                if self._host is None:
                    remote = self._ray.remote(RoleHost).options(**self._placement)
                    self._host = remote.remote(self._spec, self._needed)  # which starts the process
                elif self._state is None:
                    await self._host.ensure_running.remote()
                self._note_state(await self._host.state.remote())
            except (errors.ActorDiedError, errors.ActorUnschedulableError) as error:  # for good: it could not be made
                self._host = None
                self._end_with(_first_line(error) + _token_advice())
            except errors.RayTaskError as error:  # the node refused: no memory, no disk
                self._end_with(_first_line(error))
            except errors.RayError as error:
                if self._reached:
                    logger.warning("%s cannot be reached: %s", self.name, _first_line(error))
                self._reached = False
            await asyncio.sleep(POLL_S)

    def _note_state(self, state: HostState) -> None:
        old = self._state
        if old is not None and old.host != state.host:
            logger.warning("%s goes on at %s", self.name, state.node)
        self._state, self._reached = state, True
        self._ended = state.returncode is not None

    def _end_with(self, words: str) -> None:
        self._state = HostState(0, None, 1, self.where, "", words)
        self._ended = True


def gpu_share(gpus: float, wanting: int) -> float:
    """GPUs for each of `wanting` processes: one where there are enough, else an equal part in hundredths."""
    return min(1.0, int(100 * gpus / wanting) / 100) if wanting else 0.0


def _has_token() -> bool:
    """Whether this user has a token for clusters that ask for one."""
    named = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    return named or (Path.home() / ".ray" / "auth_token").is_file()


def _token_advice() -> str:
    """Ray ends an actor without a reason where this process sends a token and its cluster knows of none."""
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return ""
    return " (if the cluster was started before there was a token, or without: set RAY_AUTH_MODE=disabled)"


def _require_listener(address: str) -> None:
    """Ray itself looks for minutes for a cluster that is not there.

    Raises:
        LaunchError: nobody accepts connections at `address`, or at the one that `auto` stands for.
    """
    named = address
    if address == "auto":
        noted = Path(os.environ.get("RAY_TMPDIR", "/tmp/ray")) / "ray_current_cluster"
        named = os.environ.get("RAY_ADDRESS") or (noted.read_text().strip() if noted.is_file() else "")
    host, _, port = named.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return  # `local`, or Ray has to find it out
    try:
        socket.create_connection((host.strip("[]"), int(port)), LISTENS_WITHIN_S).close()
    except OSError as error:
        raise LaunchError(
            f"no Ray cluster at {named}: {error.strerror or error} (start one with `ray start --head`, or use "
            "--address local)"
        ) from None


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:WORDS_CHARACTERS] if lines else type(error).__name__
