"""A local search server in a process of its own, for benchmarks of what asks it."""

from __future__ import annotations

import dataclasses
import importlib
import multiprocessing
import re
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Literal, Self

from rewarders.servers.traffic import ServerSettings

START_WITHIN_S = 120.0  # an index may have to be built
END_WITHIN_S = 10.0

Kind = Literal["pubmed", "ctgov"]


class SearchProcess:
    """Serves until it is left (`with`). Its `base_url` takes the place of the real service's address.

    Raises:
        RuntimeError: the server did not come up.
    """

    def __init__(self, kind: Kind, settings: ServerSettings) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=_serve, args=(kind, settings, theirs), daemon=True)
        self._process.start()
        theirs.close()
        try:
            said = ours.recv() if ours.poll(START_WITHIN_S) else ""
        except EOFError:
            said = ""
        address = re.search(r"https?://[^/\s]+", said)
        if address is None:
            self.close()
            raise RuntimeError(f"the {kind} server did not come up: {said or 'see what it printed above'}")
        self.base_url = address.group()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.join(END_WITHIN_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _serve(kind: Kind, settings: ServerSettings, said: Connection) -> None:
    service = importlib.import_module(f"rewarders.servers.{kind}")
    # Each service has settings of its own beside those of all.
    service.run(service.ServerSettings(**dataclasses.asdict(settings)), say=said.send)
