"""A Ray cluster of several nodes on this machine, whose nodes can be lost and added."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


# What the nodes have to inherit: this code, no statistics sent, no token (`Cluster` asks for none).
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}


class Nodes:
    """A head with room for the roles at home, one node for an actor of two threads, and a small one.

    To be made with `ENVIRONMENT` in force; `shutdown` ends it.
    """

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        self.add(cpus=3)
        self.add(cpus=1)

    @property
    def address(self) -> str:
        """Where `deepretrieval launch --on ray --address` finds it."""
        return str(self.cluster.address)

    def add(self, cpus: int) -> None:
        """One more node."""
        self.cluster.add_node(num_cpus=cpus)

    def lose(self, node_id: str) -> None:
        """End a node at once, with everything that runs on it; `node_id` may be cut."""
        table = {node["NodeID"]: node["RayletSocketName"] for node in self.cluster.global_state.node_table()}
        (socket,) = [name for identity, name in table.items() if identity.startswith(node_id)]
        (node,) = [node for node in self.cluster.worker_nodes if node.raylet_socket_name == socket]
        self.cluster.remove_node(node, allow_graceful=False)

    def shutdown(self) -> None:
        """End all nodes."""
        self.cluster.shutdown()
