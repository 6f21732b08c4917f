"""Weights from the learner's server to an actor: every byte, checked, whatever happens on the way."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.weight_receiver import WeightReceiver, WeightTransferError
from common.messages import RunState
from common.transport.keys import create_run_keys, load_run_keys
from common.weights import CHUNK_BYTES, file_checksum
from learner.weight_server import WeightServer


@pytest.fixture
def keys_dir(tmp_path: Path) -> Path:
    create_run_keys(tmp_path / "keys")
    return tmp_path / "keys"


@pytest.fixture
def server(tmp_path: Path, keys_dir: Path) -> Iterator[WeightServer]:
    server = WeightServer(tmp_path / "weights", load_run_keys(keys_dir, "learner"), "127.0.0.1", keep=2)
    yield server
    server.close()


def publish(server: WeightServer, keys_dir: Path, version: int, size: int) -> tuple[RunState, bytes]:
    content = os.urandom(size)
    path = server.path_of(version)
    path.write_bytes(content)
    server.publish(version)
    key = load_run_keys(keys_dir, "learner").own.public.decode()
    return RunState(1, version, server.endpoint, key, file_checksum(path)), content


@pytest.mark.parametrize("size", [1, CHUNK_BYTES, 7 * CHUNK_BYTES + 12_345])
async def test_a_version_arrives_byte_for_byte(server: WeightServer, keys_dir: Path, tmp_path: Path, size: int) -> None:
    state, content = publish(server, keys_dir, 3, size)
    receiver = WeightReceiver(load_run_keys(keys_dir, "actor"), tmp_path)
    try:
        assert (await receiver.pull(state)).read_bytes() == content
    finally:
        receiver.close()


async def test_old_versions_go_and_the_newest_is_named(server: WeightServer, keys_dir: Path, tmp_path: Path) -> None:
    old, _ = publish(server, keys_dir, 1, 10)
    for version in (2, 3):
        publish(server, keys_dir, version, 10)
    assert not server.path_of(1).exists()
    receiver = WeightReceiver(load_run_keys(keys_dir, "actor"), tmp_path)
    try:
        with pytest.raises(WeightTransferError, match="version 1 is gone, the newest is 3"):
            await receiver.pull(old)
    finally:
        receiver.close()


async def test_wrong_bytes_are_never_handed_to_an_engine(server: WeightServer, keys_dir: Path, tmp_path: Path) -> None:
    state, _ = publish(server, keys_dir, 1, 100)
    announced = RunState(1, 1, state.weights_endpoint, state.weights_key, "0" * 64)
    receiver = WeightReceiver(load_run_keys(keys_dir, "actor"), tmp_path)
    try:
        with pytest.raises(WeightTransferError, match="checksum"):
            await receiver.pull(announced)
    finally:
        receiver.close()


async def test_a_silent_learner_and_a_foreign_key_end_in_an_error(
    server: WeightServer, keys_dir: Path, tmp_path: Path
) -> None:
    state, _ = publish(server, keys_dir, 1, 100)
    create_run_keys(tmp_path / "other")
    foreign = WeightReceiver(load_run_keys(tmp_path / "other", "actor"), tmp_path, timeout_s=0.5)
    rewarder = WeightReceiver(load_run_keys(keys_dir, "rewarder"), tmp_path, timeout_s=0.5)
    try:
        for receiver in (foreign, rewarder):
            with pytest.raises(WeightTransferError, match="sent nothing"):
                await receiver.pull(state)
    finally:
        foreign.close()
        rewarder.close()
