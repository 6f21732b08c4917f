"""Scored groups between the connection's thread and the learner's loop, bounded in number and in bytes."""

from __future__ import annotations

import queue
import threading

from common import messages as m


class GroupQueue:
    """First in, first out; thread-safe.

    Args:
        max_groups, max_bytes: from which on it is full. One more fits in bytes than there is room for, so that a
            group larger than all of it is let in when it is empty.
    """

    def __init__(self, max_groups: int, max_bytes: int) -> None:
        self._max_groups = max_groups
        self._max_bytes = max_bytes
        self._groups: queue.SimpleQueue[tuple[m.ScoredGroup, int]] = queue.SimpleQueue()
        self._bytes = 0
        self._lock = threading.Lock()

    def qsize(self) -> int:
        """Groups that wait."""
        return self._groups.qsize()

    def full(self) -> bool:
        """Whether nothing must be put in now."""
        return self.qsize() >= self._max_groups or self._bytes >= self._max_bytes

    def put(self, group: m.ScoredGroup, size: int) -> None:
        """Append a group of `size` bytes.

        Raises:
            queue.Full: ask `full` before.
        """
        if self.full():
            raise queue.Full
        with self._lock:
            self._bytes += size
        self._groups.put((group, size))

    def get(self, timeout: float) -> m.ScoredGroup:
        """The oldest group. Raises queue.Empty after `timeout` seconds."""
        return self._taken(self._groups.get(timeout=timeout))

    def get_nowait(self) -> m.ScoredGroup:
        """The oldest group. Raises queue.Empty where there is none."""
        return self._taken(self._groups.get_nowait())

    def _taken(self, entry: tuple[m.ScoredGroup, int]) -> m.ScoredGroup:
        group, size = entry
        with self._lock:
            self._bytes -= size
        return group
