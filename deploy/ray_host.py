"""What runs on a Ray node: `RoleHost`, one per role, with the role's process as its child.

Only numbers and strings cross Ray's control path; the role itself talks ZeroMQ, as everywhere.
"""

from __future__ import annotations

import hashlib
import os
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from deploy.processes import ChildProcess, RoleSpec

NODE_DIGITS = 12  # of a node's id, in what people read


@dataclass(frozen=True)
class HostState:
    """What a host tells of its role.

    Attributes:
        host: number of this host's process, which tells a host from its replacement.
        node: address and id of the node.
    """

    host: int
    pid: int | None
    returncode: int | None
    node: str
    error: str = ""
    words: str = ""


class RoleHost:
    """Keeps the process of one role on this node. Ray makes it anew on another node if this one is lost.

    The process is started with the host. It dies with it, at once: Ray gives its place to another, and two of a
    name would take each other's work.
    """

    def __init__(self, spec: RoleSpec, needed: Sequence[tuple[str, str]]) -> None:
        import ray

        self._node = f"{ray.util.get_node_ip_address()} (node {ray.get_runtime_context().get_node_id()[:NODE_DIGITS]})"
        environment = {**spec.environment, "PYTHONPATH": _python_path()}
        self._child = ChildProcess(replace(spec, environment=environment), parent_grace_s=0.0)
        self._unseen = ""
        self._needed = needed
        self.ensure_running()

    def ensure_running(self) -> HostState:
        """Start the process if it does not run."""
        if not self._child.running:
            self._unseen = "; ".join(unseen_files(self._needed))
            if not self._unseen:
                self._child.start()
        return self.state()

    def state(self) -> HostState:
        """How it is doing."""
        if self._unseen:
            words = f"{socket.gethostname()} does not see what the launcher sees: {self._unseen}"
            return HostState(os.getpid(), None, 1, self._node, words, words)
        status = self._child.returncode
        ended = status is not None
        return HostState(
            host=os.getpid(),
            pid=self._child.pid,
            returncode=status,
            node=self._node,
            error=self._child.error() if ended else "",
            words=self._child.last_words() if ended else "",
        )

    def terminate(self) -> HostState:
        """SIGTERM: it may finish what it has begun."""
        self._child.signal(signal.SIGTERM)
        return self.state()

    def kill(self) -> HostState:
        """SIGKILL, for all its children too."""
        self._child.kill()
        return self.state()


def file_marks(files: Sequence[Path]) -> list[tuple[str, str]]:
    """Paths with a hash of their content."""
    return [(str(path), _hash(path)) for path in files]


def unseen_files(marks: Sequence[tuple[str, str]]) -> list[str]:
    """The paths of `file_marks` that this machine does not have, or has with another content."""
    return [path for path, mark in marks if not Path(path).is_file() or _hash(Path(path)) != mark]


def port_on_this_node(host: str) -> int:
    """A port nobody listens on just now."""
    from deploy.sites import free_port

    return free_port(host)


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _python_path() -> str:
    """So that the role's process finds this package where Ray's worker found it."""
    own = str(Path(__file__).resolve().parents[1])
    return os.pathsep.join(dict.fromkeys([own, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]))
