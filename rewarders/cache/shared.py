"""What the cache needs of whoever shares results over the fleet."""

from __future__ import annotations

from typing import Protocol


class FleetResults(Protocol):
    """Kept by `common.transport.shared_results.SharedResults`, through the broker.

    It never fails: where it cannot help, `get` says that one should fetch oneself.
    """

    async def get(self, key: bytes) -> bytes | None:
        """The result under `key`, perhaps after another has fetched it. None: fetch it, then say `put` or `failed`."""

    def put(self, key: bytes, payload: bytes) -> None:
        """The result, for everybody."""

    def failed(self, key: bytes) -> None:
        """It could not be fetched: the next who waits may try."""
