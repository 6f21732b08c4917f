"""The broker with real sockets under CURVE: a group's way from ticket to learner, and who is kept out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zmq

from common import messages as m
from common.broker.server import BrokerServer
from common.broker.service import BrokerService, BrokerSettings
from common.transport.client import BrokerClient, BrokerUnreachableError
from common.transport.keys import KeyFileError, create_run_keys, load_run_keys
from tests.common.broker_world import RunningBroker, next_assignment, peer, rollout, scores, status_when, ticket


@pytest.fixture
def keys_dir(tmp_path: Path) -> Path:
    create_run_keys(tmp_path / "keys")
    return tmp_path / "keys"


@pytest.fixture
def broker(keys_dir: Path) -> Iterator[RunningBroker]:
    running = RunningBroker(keys_dir, BrokerSettings(epoch=1, lease_s=1.0, heartbeat_s=0.1))
    yield running
    running.stop()


async def test_a_group_goes_from_ticket_to_learner_unchanged(broker: RunningBroker, keys_dir: Path) -> None:
    async with (
        peer(broker.endpoint, keys_dir, "learner", incarnation=1) as learner,
        peer(broker.endpoint, keys_dir, "actor") as actor,
        peer(broker.endpoint, keys_dir, "rewarder") as rewarder,
    ):
        actor.serve("rollout", 1)
        rewarder.serve("score", 1)
        learner.serve("train", 10)
        learner.submit([ticket(7)])
        work = await next_assignment(actor)
        assert m.decode(work.payload[0], m.Ticket) == ticket(7)
        actor.complete(work, m.encode_rollout(rollout(7)))
        to_score = await next_assignment(rewarder)
        assert len(to_score.payload) == 2, "arrays do not travel to rewarders"
        assert m.decode(to_score.payload[1], m.RolloutHeader) == rollout(7).header
        rewarder.complete(to_score, [m.encode(scores(7))])
        received = await next_assignment(learner)
        group = m.decode_scored_group(received.payload)
        np.testing.assert_array_equal(group.rollout.logprobs, rollout(7).logprobs)
        np.testing.assert_array_equal(group.rollout.token_ids, rollout(7).token_ids)
        assert group.scores == scores(7)
        learner.complete(received)
        status = await learner.fleet_status()
        assert all(stage.queued == stage.leased == stage.bytes == 0 for stage in status.stages.values())
        assert {entry.role for entry in status.peers} == {"learner", "actor", "rewarder"}


async def test_work_of_a_silent_actor_goes_to_another_and_its_late_answer_is_discarded(
    broker: RunningBroker, keys_dir: Path
) -> None:
    async with (
        peer(broker.endpoint, keys_dir, "learner", incarnation=1) as learner,
        peer(broker.endpoint, keys_dir, "actor", "silent") as silent,
        peer(broker.endpoint, keys_dir, "actor", "other") as other,
    ):
        silent.serve("rollout", 1)
        learner.submit([ticket(1)])
        work = await next_assignment(silent)
        for task in silent._tasks:
            task.cancel()  # no heartbeat any more
        other.serve("rollout", 1)
        again = await next_assignment(other)
        assert again.lease.item == work.lease.item
        assert again.lease.lease != work.lease.lease
        silent._hello()  # it is back
        silent.complete(work, m.encode_rollout(rollout(1)))
        status = await status_when(learner, lambda status: status.stages["rollout"].late == 1)
        assert status.stages["score"].queued == 0
        other.complete(again, m.encode_rollout(rollout(1)))
        await status_when(learner, lambda status: status.stages["score"].queued == 1)


async def test_a_restarted_broker_is_found_again_and_gets_the_tickets_again(keys_dir: Path) -> None:
    first = RunningBroker(keys_dir, BrokerSettings(epoch=1, heartbeat_s=0.1))
    port = int(first.endpoint.rpartition(":")[2])
    connections: list[int] = []
    learner = BrokerClient(
        first.endpoint, load_run_keys(keys_dir, "learner"), "learner", "learner", 1, lambda: connections.append(1)
    )
    await learner.start()
    learner.submit([ticket(1), ticket(2)])
    await asyncio.sleep(0.2)
    await asyncio.to_thread(first.stop)
    second = RunningBroker(keys_dir, BrokerSettings(epoch=2, heartbeat_s=0.1), port)
    try:
        deadline = time.monotonic() + 10
        while len(connections) < 2 and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        assert len(connections) == 2, "the learner was told of the new broker"
        learner.submit([ticket(1), ticket(2)])
        learner.submit([ticket(1), ticket(2)])
        status = await learner.fleet_status()
        assert status.stages["rollout"].queued == 2, "tickets submitted twice count once"
    finally:
        await learner.close()
        await asyncio.to_thread(second.stop)


async def test_a_new_learner_voids_the_work_of_the_old_one(broker: RunningBroker, keys_dir: Path) -> None:
    async with peer(broker.endpoint, keys_dir, "learner", "old", incarnation=1) as old:
        old.submit([ticket(1)])
        async with peer(broker.endpoint, keys_dir, "learner", "new", incarnation=2) as new:
            status = await new.fleet_status()
            assert status.stages["rollout"].queued == 0
            assert [entry.name for entry in status.peers] == ["new"]


async def test_state_reaches_every_peer_also_late_ones(broker: RunningBroker, keys_dir: Path) -> None:
    async with (
        peer(broker.endpoint, keys_dir, "learner", incarnation=3) as learner,
        peer(broker.endpoint, keys_dir, "actor", "early") as early,
    ):
        learner.announce(m.RunState(3, 40, "tcp://here:1", "key", "sum"))
        assert (await asyncio.wait_for(early.wait_for_state(lambda s: s.version == 40), 3)).checksum == "sum"
        async with peer(broker.endpoint, keys_dir, "actor", "late") as late:
            assert late.state == learner.state


async def test_garbage_from_an_authenticated_peer_is_counted_and_loses_nothing(
    broker: RunningBroker, keys_dir: Path
) -> None:
    async with (
        peer(broker.endpoint, keys_dir, "learner", incarnation=1) as learner,
        peer(broker.endpoint, keys_dir, "actor") as actor,
    ):
        actor.serve("rollout", 1)
        learner.submit([ticket(5)])
        work = await next_assignment(actor)
        wrong_sizes = m.encode_rollout(rollout(5))
        wrong_sizes[3] = bytes(wrong_sizes[3])[:-4]
        for bad in ([b"\xff\x00", b"x"], [m.encode(m.Complete(work.lease)), *wrong_sizes], [m.encode(m.Submit((9,)))]):
            await actor._line.socket.send_multipart(bad)
        await actor._line.socket.send_multipart([m.encode(m.Complete(work.lease)), *m.encode_rollout(rollout(6))])
        status = await status_when(learner, lambda status: status.rejected_frames == 4)
        assert status.stages["rollout"].leased == 1, "the lease survives a garbled result"
        actor.complete(work, m.encode_rollout(rollout(5)))
        status = await status_when(learner, lambda status: status.stages["score"].queued == 1)
        assert status.rejected_frames == 4


async def test_foreign_keys_never_reach_a_handler(broker: RunningBroker, keys_dir: Path, tmp_path: Path) -> None:
    create_run_keys(tmp_path / "other-run")
    foreign = load_run_keys(tmp_path / "other-run", "learner")
    foreign.public["broker"] = load_run_keys(keys_dir, "broker").own.public
    intruder = BrokerClient(broker.endpoint, foreign, "learner", "intruder", 9)
    with pytest.raises(BrokerUnreachableError, match="keys folder"):
        await intruder.start(timeout_s=1.0)
    context = zmq.Context()
    plain = context.socket(zmq.DEALER)
    plain.linger = 0
    plain.connect(broker.endpoint)
    plain.send_multipart([m.encode(m.Hello("learner", 9))])
    assert plain.poll(500) == 0
    plain.close()
    context.term()
    assert broker.service.status(time.monotonic()).peers == ()
    assert broker.service.rejected_frames == 0


async def test_a_key_cannot_act_as_another_role(broker: RunningBroker, keys_dir: Path) -> None:
    keys = load_run_keys(keys_dir, "rewarder")
    impostor = BrokerClient(broker.endpoint, keys, "learner", "impostor", 9)
    with pytest.raises(BrokerUnreachableError):
        await impostor.start(timeout_s=0.5)
    assert broker.service.rejected_frames == 1


async def test_the_quota_is_shared_by_all_rewarders(keys_dir: Path) -> None:
    settings = BrokerSettings(epoch=1, heartbeat_s=0.1, quota=(3, 0.3, 0.2))
    broker = RunningBroker(keys_dir, settings)
    sent: list[float] = []

    async def ask(client: BrokerClient) -> None:
        async with client.quota_slot() as slot:
            sent.append(time.monotonic())
            slot.replied()

    try:
        async with (
            peer(broker.endpoint, keys_dir, "rewarder", "one") as one,
            peer(broker.endpoint, keys_dir, "rewarder", "two") as two,
        ):
            await asyncio.gather(*(ask(client) for client in (one, two) for _ in range(6)))
    finally:
        await asyncio.to_thread(broker.stop)
    sent.sort()
    assert len(sent) == 12
    assert all(later - earlier >= 0.3 for earlier, later in zip(sent, sent[3:], strict=False))


async def test_a_grant_that_was_read_late_is_not_used(keys_dir: Path) -> None:
    """A process that was stopped finds an old grant in its socket, and its clock cannot tell that it is old."""
    broker = RunningBroker(keys_dir, BrokerSettings(epoch=1, heartbeat_s=0.1, quota=(1, 0.3, 0.2)))
    slots = broker.service.quota.pool
    assert slots is not None
    try:
        async with peer(broker.endpoint, keys_dir, "rewarder") as client:
            async with client.quota_slot() as slot:
                slot.replied()
            second = asyncio.create_task(hold_slot(client))
            while not slots.waiting:
                await asyncio.sleep(0.01)
            asked_at = time.monotonic()
            while slots.granted < 2 or time.monotonic() < asked_at + 1.2:
                time.sleep(0.05)
            read_late = slots.granted
            granted_at = await second
            assert slots.granted > read_late, "the old grant was given back, and another one asked for"
            assert granted_at > asked_at + 1.2
    finally:
        await asyncio.to_thread(broker.stop)


async def hold_slot(client: BrokerClient) -> float:
    """When the slot was had."""
    async with client.quota_slot() as slot:
        had_at = time.monotonic()
        slot.replied()
        return had_at


async def test_a_refusal_seen_by_one_rewarder_makes_all_wait(keys_dir: Path) -> None:
    broker = RunningBroker(keys_dir, BrokerSettings(epoch=1, heartbeat_s=0.1, quota=(5, 0.1, 0.1)))
    try:
        async with (
            peer(broker.endpoint, keys_dir, "rewarder", "one") as one,
            peer(broker.endpoint, keys_dir, "rewarder", "two") as two,
        ):
            async with one.quota_slot() as slot:
                slot.replied(limit=5, remaining=0)
                slot.throttled(1.0)
            status = await status_when(two, lambda status: status.slots_refused == 1)
            assert "asked for a pause" in status.quota_waits_for
            heard_at = time.monotonic()
            assert await hold_slot(two) > heard_at + 0.5
    finally:
        await asyncio.to_thread(broker.stop)


async def test_nothing_is_granted_outside_the_hours(keys_dir: Path) -> None:
    closed = [(3600.0, "better hours")]
    broker = RunningBroker(keys_dir, BrokerSettings(epoch=1, heartbeat_s=0.1, quota=(5, 0.1, 0.1)), hours=closed)
    try:
        async with peer(broker.endpoint, keys_dir, "rewarder") as client:
            client.pause = lambda: closed[0][1]
            waiting = asyncio.create_task(hold_slot(client))
            await status_when(client, lambda status: status.peers[0].status.waits_for == "better hours")
            status = await status_when(client, lambda status: status.quota_waits_for == "better hours")
            await asyncio.sleep(0.5)
            assert not waiting.done()
            assert status.slots_granted == 0
            closed[0] = (0.0, "")
            await waiting
    finally:
        await asyncio.to_thread(broker.stop)


def test_keys_are_private_and_their_faults_are_named(tmp_path: Path) -> None:
    create_run_keys(tmp_path / "k")
    secret = tmp_path / "k" / "actor.key"
    assert secret.stat().st_mode & 0o777 == 0o600
    before = secret.read_bytes()
    create_run_keys(tmp_path / "k")
    assert secret.read_bytes() == before, "keys of a run are made once"
    secret.chmod(0o644)
    with pytest.raises(KeyFileError, match="chmod 600"):
        load_run_keys(tmp_path / "k", "actor")
    with pytest.raises(KeyFileError, match="copy the keys folder"):
        load_run_keys(tmp_path / "absent", "actor")


def test_a_taken_port_is_named(broker: RunningBroker, keys_dir: Path) -> None:
    second = BrokerServer(BrokerService(BrokerSettings(epoch=2), 0.0), load_run_keys(keys_dir, "broker"))
    port = int(broker.endpoint.rpartition(":")[2])
    with pytest.raises(OSError, match=f"cannot bind tcp://127.0.0.1:{port}"):
        second.bind("127.0.0.1", port)
    second.close()
