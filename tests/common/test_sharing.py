"""Results shared through a real broker: one fetcher over the whole fleet, and nobody who depends on another's life."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from common import cache_messages as c
from common import messages as m
from common.broker.service import BrokerService, BrokerSettings
from common.transport.client import BrokerClient
from common.transport.keys import create_run_keys
from common.transport.shared_results import SharedResults
from tests.common.broker_world import RunningBroker, peer, status_when

KEY = b"k" * 32
PATIENCE_S = 30.0


@pytest.fixture
def keys_dir(tmp_path: Path) -> Path:
    create_run_keys(tmp_path / "keys")
    return tmp_path / "keys"


@pytest.fixture
async def broker(keys_dir: Path) -> AsyncIterator[RunningBroker]:
    running = RunningBroker(keys_dir, BrokerSettings(epoch=1, heartbeat_s=0.05))
    yield running
    await asyncio.to_thread(running.stop)


async def waits(broker: RunningBroker, number: int) -> None:
    """Until so many questions are in flight at the broker."""
    async with asyncio.timeout(PATIENCE_S):
        while broker.service.sharing.cache.asking != number:
            await asyncio.sleep(0.01)


async def test_one_fetches_for_all_and_late_comers_get_it_at_once(broker: RunningBroker, keys_dir: Path) -> None:
    async with (
        peer(broker.endpoint, keys_dir, "rewarder", "one") as one,
        peer(broker.endpoint, keys_dir, "rewarder", "two") as two,
        peer(broker.endpoint, keys_dir, "rewarder", "three") as three,
    ):
        assert await one.shared.get(KEY) is None
        asked = [asyncio.create_task(other.shared.get(KEY)) for other in (two, three)]
        await waits(broker, 3)
        one.shared.put(KEY, b"found")
        assert await asyncio.gather(*asked) == [b"found", b"found"]
        assert await one.shared.get(KEY) == b"found"


async def test_the_next_fetches_where_the_first_fails_or_leaves(broker: RunningBroker, keys_dir: Path) -> None:
    async with (
        peer(broker.endpoint, keys_dir, "rewarder", "two") as two,
        peer(broker.endpoint, keys_dir, "rewarder", "three") as three,
    ):
        async with peer(broker.endpoint, keys_dir, "rewarder", "one") as one:
            assert await one.shared.get(KEY) is None
            second = asyncio.create_task(two.shared.get(KEY))
            await waits(broker, 2)
            third = asyncio.create_task(three.shared.get(KEY))
            await waits(broker, 3)
            one.shared.failed(KEY)
            assert await second is None
            assert not third.done()
        two._send(m.Bye())
        assert await third is None


async def test_a_waiter_that_gives_up_hands_its_turn_on(broker: RunningBroker, keys_dir: Path) -> None:
    async with (
        peer(broker.endpoint, keys_dir, "rewarder", "one") as one,
        peer(broker.endpoint, keys_dir, "rewarder", "two") as two,
    ):
        assert await one.shared.get(KEY) is None
        second = asyncio.create_task(two.shared.get(KEY))
        await waits(broker, 2)
        second.cancel()
        await waits(broker, 1)
        one.shared.failed(KEY)
        await waits(broker, 0)


async def test_a_promise_is_renewed_while_the_fetch_lasts_and_lapses_without(keys_dir: Path) -> None:
    broker = RunningBroker(keys_dir, BrokerSettings(epoch=1, heartbeat_s=0.05))
    broker.service.sharing.cache.promise_s = 0.5
    try:
        async with (
            peer(broker.endpoint, keys_dir, "rewarder", "one") as one,
            peer(broker.endpoint, keys_dir, "rewarder", "two") as two,
        ):
            assert await one.shared.get(KEY) is None
            waiter = asyncio.create_task(two.shared.get(KEY))
            renewals = count_renewals(one)
            async with asyncio.timeout(PATIENCE_S):
                while len(renewals) < 5:
                    await asyncio.sleep(0.05)
                one._tasks[1].cancel()  # its heartbeat: it is stopped
                assert await waiter is None, "who waited fetches"
    finally:
        await asyncio.to_thread(broker.stop)


def count_renewals(client: BrokerClient) -> list[m.AnyToBroker]:
    seen: list[m.AnyToBroker] = []
    send = client.shared._send

    def count(message: m.AnyToBroker, payload: m.Payload) -> None:
        if isinstance(message, c.CacheRenew):
            seen.append(message)
        send(message, payload)

    client.shared._send = count
    return seen


async def test_a_silent_broker_means_fetching_oneself() -> None:
    sent: list[m.AnyToBroker] = []
    shared = SharedResults(lambda message, _: sent.append(message), answer_within_s=0.05)
    assert await shared.get(KEY) is None
    shared.handle(c.CacheFetch(KEY, 15.0), [])  # late: that is under way
    assert sent == [c.CacheGet(KEY)]
    shared.put(KEY, b"found")
    shared.handle(c.CacheFetch(KEY, 15.0), [])  # later still: no
    assert sent[1:] == [c.CachePut(KEY), c.CacheFailed(KEY)]


async def test_a_broker_that_falls_silent_while_one_waits_is_asked_again_and_given_up() -> None:
    sent: list[m.AnyToBroker] = []
    shared = SharedResults(lambda message, _: sent.append(message), answer_within_s=0.2)
    asked = asyncio.create_task(shared.get(KEY))
    await asyncio.sleep(0)
    shared.handle(c.CacheWait(KEY, 0.0), [])
    shared.beat()
    assert sent == [c.CacheGet(KEY)] * 2
    assert await asked is None


async def test_a_new_broker_is_asked_again(keys_dir: Path) -> None:
    first = RunningBroker(keys_dir, BrokerSettings(epoch=1, heartbeat_s=0.05))
    port = int(first.endpoint.rpartition(":")[2])
    async with (
        peer(first.endpoint, keys_dir, "rewarder", "one") as one,
        peer(first.endpoint, keys_dir, "rewarder", "two") as two,
    ):
        assert await one.shared.get(KEY) is None
        asked = asyncio.create_task(two.shared.get(KEY))
        await waits(first, 2)
        await asyncio.to_thread(first.stop)
        second = RunningBroker(keys_dir, BrokerSettings(epoch=2, heartbeat_s=0.05), port)
        try:
            async with asyncio.timeout(PATIENCE_S):
                assert await asked is None, "told to fetch by the new broker, or tired of waiting"
        finally:
            await asyncio.to_thread(second.stop)


async def test_what_is_too_large_to_share_is_not_waited_for(broker: RunningBroker, keys_dir: Path) -> None:
    async with (
        peer(broker.endpoint, keys_dir, "rewarder", "one") as one,
        peer(broker.endpoint, keys_dir, "rewarder", "two") as two,
    ):
        assert await one.shared.get(KEY) is None
        asked = asyncio.create_task(two.shared.get(KEY))
        await waits(broker, 2)
        one.shared.put(KEY, bytes(c.MAX_RESULT_BYTES + 1))
        assert await asked is None
        assert broker.service.rejected_frames == 0


async def test_only_rewarders_share_and_results_have_one_bounded_frame(broker: RunningBroker, keys_dir: Path) -> None:
    async with (
        peer(broker.endpoint, keys_dir, "actor") as actor,
        peer(broker.endpoint, keys_dir, "rewarder") as rewarder,
    ):
        actor._send(c.CacheGet(KEY))
        actor._send(c.CachePut(KEY), [b"poison"])
        rewarder._send(c.CachePut(KEY))
        rewarder._send(c.CachePut(KEY), [b"a", b"b"])
        rewarder._send(c.CachePut(KEY), [b""])
        rewarder._send(c.CachePut(KEY), [bytes(c.MAX_RESULT_BYTES + 1)])
        rewarder._send(c.CacheGet(KEY), [b"payload"])
        await status_when(actor, lambda status: status.rejected_frames == 7)
        assert len(broker.service.sharing.cache) == 0


def test_who_is_forgotten_is_not_waited_for() -> None:
    service = BrokerService(BrokerSettings(epoch=1, lease_s=5.0), now=0.0)
    for name in ("one", "two"):
        service.handle(name, "rewarder", m.Hello("rewarder"), (), 0.0)
        service.handle(name, "rewarder", c.CacheGet(KEY), (), 0.0)
    assert [answer.message for answer in service.tick(0.0)] == [c.CacheFetch(KEY, 15.0), c.CacheWait(KEY, 15.0)]
    service.handle("two", "rewarder", c.CacheGet(KEY), (), 4.0)
    service.tick(4.0)
    answers = service.tick(6.0)  # "one" is silent for longer than a lease
    assert [(answer.peer, answer.message) for answer in answers] == [("two", c.CacheFetch(KEY, 15.0))]
