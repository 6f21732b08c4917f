"""In which order the quota is spent: groups begun first, then what expires first; nothing on what is not held."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from rewarders.search_order import SearchOrder, Turn, current_turn


class Quota:
    """Grants one request at a time, when told to, in the order in which they ask."""

    def __init__(self) -> None:
        self.waiting: list[asyncio.Future[None]] = []
        self.most_waiting = 0

    @asynccontextmanager
    async def permit(self) -> AsyncIterator[str]:
        grant: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting.append(grant)
        self.most_waiting = max(self.most_waiting, len(self.waiting))
        try:
            await grant
        finally:
            self.waiting.remove(grant)
        yield "slot"

    async def grant_all(self) -> None:
        """Until nobody asks any more."""
        for _ in range(1000):
            await asyncio.sleep(0)
            if self.waiting and not self.waiting[0].done():
                self.waiting[0].set_result(None)
        assert not self.waiting


class Searches:
    """Groups that search under one order; `sent` says in which order they got through."""

    def __init__(self, ahead: int) -> None:
        self.quota = Quota()
        self.order = SearchOrder(self.quota.permit, ahead)
        self.sent: list[str] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}

    def add(self, name: str, turn: Turn | None, searches: int) -> None:
        for number in range(searches):
            self.tasks[f"{name}{number}"] = asyncio.create_task(self._search(name, turn))

    async def _search(self, name: str, turn: Turn | None) -> None:
        current_turn.set(turn)
        async with self.order() as slot:
            assert slot == "slot"
            self.sent.append(name)

    async def finish(self) -> str:
        await self.quota.grant_all()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)
        return " ".join(self.sent)


async def test_a_group_begun_is_finished_before_others_and_of_those_what_expires_first_is_begun_first() -> None:
    searches = Searches(ahead=1)
    searches.add("begun", Turn(version=9, ticket=9), 3)
    await asyncio.sleep(0)
    searches.add("newest", Turn(version=9, ticket=3), 2)
    searches.add("newer", Turn(version=5, ticket=2), 2)
    searches.add("oldest", Turn(version=1, ticket=4), 2)
    searches.add("twin", Turn(version=5, ticket=1), 1)
    assert await searches.finish() == "begun begun begun oldest oldest twin newer newer newest newest"


async def test_held_out_groups_and_nobodys_requests_go_before_training() -> None:
    searches = Searches(ahead=1)
    searches.add("first", Turn(version=9, ticket=1), 1)
    await asyncio.sleep(0)
    searches.add("train", Turn(version=9, ticket=2), 1)
    searches.add("eval", Turn(version=10, ticket=3, evaluation=True), 2)
    searches.add("canary", None, 1)
    assert await searches.finish() == "first canary eval eval train"


async def test_as_many_wait_for_the_quota_as_it_may_grant_at_once() -> None:
    searches = Searches(ahead=3)
    for number in range(10):
        searches.add(str(number), Turn(version=number, ticket=number), 2)
    await searches.finish()
    assert len(searches.sent) == 20
    assert searches.quota.most_waiting == 3


async def test_who_is_cancelled_blocks_nobody() -> None:
    draw = random.Random(0)
    for _ in range(30):
        searches = Searches(ahead=2)
        for number in range(6):
            searches.add(str(number), Turn(version=number, ticket=number), 3)
        await asyncio.sleep(0)
        for name in draw.sample(sorted(searches.tasks), 9):
            searches.tasks[name].cancel()
            if draw.random() < 0.5:
                await asyncio.sleep(0)
            if searches.quota.waiting and draw.random() < 0.3 and not searches.quota.waiting[0].done():
                searches.quota.waiting[0].set_result(None)
        await searches.finish()
        assert all(task.done() for task in searches.tasks.values())
        assert sum(not task.cancelled() for task in searches.tasks.values()) == len(searches.sent)
        assert (searches.order._free, searches.order._waiting) == (2, {})


async def test_a_permit_that_fails_passes_the_turn_on() -> None:
    @asynccontextmanager
    async def broken() -> AsyncIterator[None]:
        raise ConnectionError
        yield

    order = SearchOrder(broken, ahead=1)
    for _ in range(3):
        with pytest.raises(ConnectionError):
            async with order():
                raise AssertionError("not reached")
    with pytest.raises(ValueError, match="at least 1"):
        SearchOrder(broken, ahead=0)
