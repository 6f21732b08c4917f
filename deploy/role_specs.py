"""How each role of a run is started: its command line, environment and share of a machine."""

from __future__ import annotations

from urllib.parse import urlsplit

from common.config import Config
from common.run_folder import RunFolder
from deploy.fleet import Kind
from deploy.processes import KEEP_MEMORY, RoleSpec
from deploy.search_server_command import options_of
from deploy.sites import LOOPBACK

LIGHT_CPUS = 0.25  # broker, rewarders and search server mostly wait


def endpoint_of(config: Config) -> str:
    """The broker's address."""
    return f"tcp://{config.broker.host}:{config.broker.port}"


class RoleSpecs:
    """Makes the `RoleSpec` of every role of one run.

    Args:
        config: with addresses (see `deploy.run_setup`).
        folder: of the run, as an absolute path.
        host: address at which actors reach the learner's weights.
        resume: the run goes on from its newest checkpoint.
        gpu_share: GPUs per rank and actor.
    """

    def __init__(self, config: Config, folder: RunFolder, host: str, resume: bool, gpu_share: float) -> None:
        self._config = config
        self._folder = folder
        self._host = host
        self._resume = resume
        self._gpu_share = gpu_share

    def of(self, kind: Kind, name: str) -> RoleSpec:
        """How the role of this kind and name is started."""
        config = self._config
        match kind:
            case "search-server":
                return self._spec(name, self._search_server(), home=True)
            case "broker":
                return self._spec(name, self._role("broker", "--port", str(config.broker.port)), home=True)
            case "learner":
                return self._learner(name)
            case "actor":
                arguments = self._role("actor", "--connect", endpoint_of(config), "--name", name)
                return self._spec(name, arguments, threads=config.actor.threads, heavy=True, gpus=self._gpu_share)
            case "rewarder":
                return self._spec(name, self._role("rewarder", "--connect", endpoint_of(config), "--name", name))

    def _role(self, kind: Kind, *arguments: str) -> tuple[str, ...]:
        return (kind, str(self._folder.config), *arguments)

    def _learner(self, name: str) -> RoleSpec:
        section = self._config.learner
        arguments = self._role("learner", "--connect", endpoint_of(self._config), "--host", self._host)
        if section.processes > 1:
            arguments += ("--processes", str(section.processes))
        # auto: a new run's folder holds no checkpoint at first, and the newest one where the learner is started again.
        return self._spec(
            name,
            (*arguments, "--resume=must" if self._resume else "--resume=auto"),
            threads=section.threads,
            heavy=True,
            cpus=float(section.threads * section.processes),
            gpus=self._gpu_share * section.processes,
            home=True,
        )

    def _search_server(self) -> tuple[str, ...]:
        search = self._config.search
        host = urlsplit(search.url or "").hostname or LOOPBACK
        return ("search-server", *options_of(self._config), "--host", host, "--port", str(search.port))

    def _spec(
        self,
        name: str,
        arguments: tuple[str, ...],
        threads: int = 1,
        heavy: bool = False,
        cpus: float | None = None,
        gpus: float = 0.0,
        home: bool = False,
    ) -> RoleSpec:
        environment = {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        if heavy:
            environment |= KEEP_MEMORY
        if cpus is None:
            cpus = float(threads) if heavy else LIGHT_CPUS
        log = self._folder.logs / f"{name}.log"
        return RoleSpec(name, arguments, log, environment, cpus, gpus, home)
