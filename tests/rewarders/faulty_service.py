"""The two local search servers with their faults, and their clients, under names that hold for both."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rewarders.engines.ctgov import CtGovEngine, CtGovSettings
from rewarders.engines.http import HttpEngine
from rewarders.engines.pubmed import PubMedEngine, PubMedSettings
from rewarders.servers import ctgov, pubmed
from rewarders.servers.ctgov import faults as ctgov_faults
from rewarders.servers.faults import Fault
from rewarders.servers.hosting import Hosted
from rewarders.servers.pubmed import faults as pubmed_faults

TIMEOUT_S = 1.0
DOCUMENTS = 20


@dataclass(frozen=True)
class Service:
    """A kind of server over `DOCUMENTS` documents; "heart" finds all of them, "word3" the one with number 3."""

    name: str
    faults: Any  # the class that draws them; takes a FaultPlan
    kinds: Any  # the Enum of them
    settings: Any
    serve: Callable[[Any, Any], Any]
    index: Any
    document: Callable[[int], str]
    engine: Callable[[str, float], HttpEngine]

    @property
    def quick(self) -> list[Any]:
        """The kinds that do not take a deadline each."""
        return [kind for kind in self.kinds if kind is not self.kinds.LATE]

    def always(self, monkeypatch: pytest.MonkeyPatch, *fates: Fault[Any] | None) -> None:
        """The server's fates from now on: the ones given, then the last of them for ever."""
        left = list(fates)
        monkeypatch.setattr(self.faults, "draw", lambda *_: left.pop(0) if len(left) > 1 else left[0])

    def build(self, folder: Path) -> Any:
        """The index of the documents, in `folder`."""
        rows = [
            {"_id": self.document(n), "title": f"Heart study {n}", "text": f"aspirin word{n}"} for n in range(DOCUMENTS)
        ]
        (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return self.index.of_corpus(folder, folder / "cache")

    @asynccontextmanager
    async def running(
        self, index: Any, timeout_s: float = TIMEOUT_S, **changes: Any
    ) -> AsyncIterator[tuple[Hosted, HttpEngine]]:
        """A server and a client of it; a late answer is later than the client waits."""
        settings = self.settings(corpus=Path("unused"), **{"fault_late_s": 30.0, **changes})
        async with await self.serve(settings, index) as server, self.engine(server.base_url, timeout_s) as engine:
            yield server, engine


PUBMED = Service(
    "pubmed",
    pubmed_faults.Faults,
    pubmed_faults.FaultKind,
    pubmed.ServerSettings,
    pubmed.serve,
    pubmed.Index,
    str,
    lambda url, timeout_s: PubMedEngine(PubMedSettings(base_url=url, api_key_env=None, timeout_s=timeout_s)),
)
CTGOV = Service(
    "ctgov",
    ctgov_faults.Faults,
    ctgov_faults.FaultKind,
    ctgov.ServerSettings,
    ctgov.serve,
    ctgov.Index,
    lambda number: f"NCT{number:08d}",
    lambda url, timeout_s: CtGovEngine(CtGovSettings(base_url=url, timeout_s=timeout_s, page_size=8)),
)
SERVICES = (PUBMED, CTGOV)
