"""Where the roles of a run are started: on this machine, or wherever else a `Site` can."""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from deploy.processes import LocalRole, RoleSpec
from deploy.supervisor import Role

LOOPBACK = "127.0.0.1"


class Site(ABC):
    """A place for roles.

    Attributes:
        host: address at which all roles reach those that have to be near the launcher (broker, learner, search
            server); their sockets are bound to it.
    """

    host: str = LOOPBACK

    @abstractmethod
    def role(self, spec: RoleSpec) -> Role:
        """A role that is to run here; its process is not started yet."""

    @abstractmethod
    def free_port(self, host: str) -> int:
        """A port nobody listens on just now, on the machine that has the address `host`."""

    @abstractmethod
    def reaches(self, host: str) -> bool:
        """Whether every role reaches an address."""

    @abstractmethod
    def gpu_share(self, learner_ranks: int, actors: int) -> float:
        """GPUs that each rank and each actor is given."""

    @abstractmethod
    def check(self, files: Sequence[Path]) -> None:
        """Make sure that every machine of the site sees these files as they are here.

        Raises:
            LaunchError: one does not.
        """

    @abstractmethod
    def close(self) -> None:
        """Give back what the site holds."""


class LocalSite(Site):
    """This machine."""

    def role(self, spec: RoleSpec) -> Role:
        return LocalRole(spec)

    def free_port(self, host: str) -> int:
        return free_port(host)

    def reaches(self, host: str) -> bool:
        return True

    def gpu_share(self, learner_ranks: int, actors: int) -> float:
        return 0.0  # the roles share what this machine has

    def check(self, files: Sequence[Path]) -> None:
        return

    def close(self) -> None:
        return


def free_port(host: str) -> int:
    """A port of this machine that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
