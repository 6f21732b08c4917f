"""What the kernel does with a request whose rewarder is killed: under a quota, it must not arrive later."""

from __future__ import annotations

import select
import socket
import struct
import subprocess
import sys

import pytest

from rewarders.engines.connections import connector
from tests.deploy.small_run import ROOT

SEND_AND_HANG = """
import asyncio, sys
from contextlib import asynccontextmanager
from rewarders.engines.base import SearchRequest
from rewarders.engines.permits import _FreeSlot, unlimited
from rewarders.engines.pubmed import PubMedEngine, PubMedSettings

@asynccontextmanager
async def permit():
    yield _FreeSlot()

async def main():
    settings = PubMedSettings(base_url=sys.argv[1], api_key_env=None, timeout_s=60.0)
    async with PubMedEngine(settings, permit=permit if sys.argv[2] == "quota" else unlimited) as engine:
        await engine.search(SearchRequest("word " * 200_000 + "the end", retmax=1))

asyncio.run(main())
"""
WINDOW = 4096  # bytes that the server takes before it reads


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux' kernel")
@pytest.mark.parametrize(("permit", "arrives"), [("quota", False), ("none", True)])
def test_a_request_of_a_killed_rewarder_is_discarded(permit: str, arrives: bool) -> None:
    """The server does not read until the rewarder is dead, so most of the request lies in the rewarder's kernel."""
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, WINDOW)
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        command = [sys.executable, "-c", SEND_AND_HANG, f"http://127.0.0.1:{listening.getsockname()[1]}", permit]
        rewarder = subprocess.Popen(command, cwd=ROOT)
        try:
            connection, _ = listening.accept()
            with connection:
                connection.settimeout(30)
                select.select([connection], [], [], 30)
                wait_until_it_can_send_no_more(rewarder.pid)
                rewarder.kill()
                rewarder.wait()
                assert was_closed_in_order(connection) == arrives
        finally:
            rewarder.kill()
            rewarder.wait()


def wait_until_it_can_send_no_more(pid: int) -> None:
    """It waits in its event loop once the buffers are full: its state is S, and stays so."""
    calm = 0
    while calm < 5:
        with open(f"/proc/{pid}/stat") as file:
            state = file.read().rpartition(") ")[2][0]
        calm = calm + 1 if state == "S" else 0
        select.select([], [], [], 0.05)


def was_closed_in_order(connection: socket.socket) -> bool:
    """Whether everything the kernel held was delivered, with a FIN after it; else it was cut off by a RST."""
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionResetError:
        return False
    return True


async def test_sockets_under_a_quota_give_up_what_is_not_acknowledged() -> None:
    under_quota = connector("http://127.0.0.1", deliver_within_s=20.0)
    make = under_quota._socket_factory
    assert make is not None
    with make((socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", 1))) as made:
        linger = made.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)
        assert struct.unpack("ii", linger) == (1, 0)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            assert made.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 20_000
    assert connector("http://127.0.0.1", deliver_within_s=None)._socket_factory is None
    await under_quota.close()
