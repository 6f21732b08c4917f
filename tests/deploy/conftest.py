"""What the tests of this folder share; a module may have a corpus or model of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.deploy.small_corpus import write_corpus
from tests.tiny_model import build_tiny_model


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One working folder for all real runs, so that the demo's world and model are built once."""
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few abstracts to search."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights."""
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
