"""One server for all tests of a module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.serving.served import Served, served


@pytest.fixture(scope="session")
def server(model: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """By the transformers engine, without a key."""
    log = tmp_path_factory.mktemp("server") / "log"
    with served(model, corpus, log, "actor.engine=transformers") as running:
        yield running
