"""The broker's process: one ROUTER socket under CURVE around `BrokerService`.

One thread and no asyncio: the loop drains what has arrived, lets the service decide and sends. Frames are
handed on without copies.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import cast

import zmq

from common import messages as m
from common.broker.service import BrokerService, Outgoing
from common.transport.keys import AllowList, RunKeys, secure_server

logger = logging.getLogger(__name__)

MAX_FRAMES = m.MAX_TICKETS + 2
DRAIN_AT_ONCE = 256  # messages handled between two looks at the clock


class BrokerServer:
    """Binds, then `run`s until told to stop."""

    def __init__(self, service: BrokerService, keys: RunKeys, max_frame_bytes: int = 64 << 20) -> None:
        self._service = service
        self._keys = keys
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._allow_list = AllowList(self._context, keys.allow_list)
        self._allow_list.__enter__()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.maxmsgsize = max_frame_bytes
        self._socket.router_handover = True
        self._socket.router_mandatory = True
        self._socket.sndhwm = 0  # what is sent is bounded by the credit of the receiver
        self._socket.linger = 500
        secure_server(self._socket, keys)

    def bind(self, host: str, port: int) -> str:
        """Bind and return the endpoint; port 0 takes a free one.

        Raises:
            OSError: the address cannot be bound; the message says which.
        """
        try:
            if port:
                self._socket.bind(f"tcp://{host}:{port}")
            else:
                port = self._socket.bind_to_random_port(f"tcp://{host}")
        except zmq.ZMQError as error:
            raise OSError(f"the broker cannot bind tcp://{host}:{port}: {error.strerror}") from None
        return f"tcp://{host}:{port}"

    def run(self, stop: Callable[[], bool], longest_wait_s: float = 0.2) -> None:
        """Serve until `stop()` is true, looked at least every `longest_wait_s` seconds."""
        try:
            while not stop():
                self._wait(longest_wait_s)
                for _ in range(DRAIN_AT_ONCE):
                    if not self._receive():
                        break
                self._send_all(self._service.tick(time.monotonic()))
        finally:
            self.close()

    def close(self) -> None:
        """Release the port."""
        self._socket.close()
        self._allow_list.__exit__()
        self._context.term()

    def _wait(self, longest_s: float) -> None:
        event = self._service.next_event()
        wait_s = longest_s if event is None else min(longest_s, max(0.0, event - time.monotonic()))
        self._socket.poll(int(wait_s * 1000) + (1 if wait_s else 0))

    def _receive(self) -> bool:
        try:
            frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        peer = frames[0].bytes.decode("utf-8", "replace")
        try:
            role, message, payload = self._decode(frames)
        except m.MessageError as error:
            self._send_all(self._service.protest(peer, str(error)))
        else:
            self._send_all(self._service.handle(peer, role, message, payload, time.monotonic()))
        return True

    def _decode(self, frames: list[zmq.Frame]) -> tuple[m.Role, m.ToBroker, list[memoryview]]:
        if not 2 <= len(frames) <= MAX_FRAMES:
            raise m.MessageError(f"a message has 1 to {MAX_FRAMES - 1} frames, this one has {len(frames) - 1}")
        role = self._keys.role_of(cast(str, frames[1].get("User-Id")).encode())
        if role is None or role == "broker":
            raise m.MessageError("the key of this peer belongs to no role")
        message = m.decode(frames[1].buffer, m.ToBroker)
        return cast(m.Role, role), message, [frame.buffer for frame in frames[2:]]

    def _send_all(self, outgoing: list[Outgoing]) -> None:
        for message in outgoing:
            frames = [message.peer.encode(), m.encode(message.message), *message.payload]
            try:
                self._socket.send_multipart(frames, zmq.NOBLOCK, copy=False)
            except zmq.ZMQError as error:  # the peer is gone: its leases run out or it says Hello again
                logger.debug("cannot send %s to %s: %s", type(message.message).__name__, message.peer, error)
