from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.rewarders.fake_ncbi import FakeNcbi, running_ncbi


@pytest.fixture
async def ncbi() -> AsyncIterator[FakeNcbi]:
    async with running_ncbi() as fake:
        yield fake
