from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.rewarders.ctgov.fake_ctgov import FakeCtGov
from tests.rewarders.fake_ncbi import FakeNcbi
from tests.rewarders.fake_upstream import FakeUpstream, running


@pytest.fixture
async def ncbi() -> AsyncIterator[FakeNcbi]:
    async with running(FakeNcbi()) as fake:
        yield fake


@pytest.fixture
async def ctgov() -> AsyncIterator[FakeCtGov]:
    async with running(FakeCtGov()) as fake:
        yield fake


@pytest.fixture(params=[FakeNcbi, FakeCtGov], ids=["pubmed", "ctgov"])
async def upstream(request: pytest.FixtureRequest) -> AsyncIterator[FakeUpstream]:
    """Either service, for what all of their clients do alike."""
    async with running(request.param()) as fake:
        yield fake
