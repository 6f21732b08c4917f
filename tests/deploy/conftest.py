"""What the slow tests of this folder share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One working folder for all real runs, so that the demo's world and model are built once."""
    return tmp_path_factory.mktemp("demo")
