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
from common.broker.service import MAX_CREDIT, BrokerService, Outgoing
from common.transport.keys import AllowList, RunKeys, secure_server

logger = logging.getLogger(__name__)

MAX_FRAMES = m.MAX_TICKETS + 2  # identity, message, payload
DRAIN_AT_ONCE = 64  # messages handled between two looks at what is due
RECEIVE_AHEAD = 256  # messages of one peer that libzmq holds before it stops reading from its connection
SEND_AHEAD = 4 * MAX_CREDIT  # messages to one peer that libzmq holds before the peer counts as unreachable
QuotaHours = Callable[
    [], tuple[float, str]
]  # seconds for which the quota stays closed (0: open), and what it waits for
LAST = int(zmq.NOBLOCK)  # as plain numbers: arithmetic with flags takes longer than sending
MORE = int(zmq.NOBLOCK | zmq.SNDMORE)
UNREAD_FOR_S = 60  # a connection whose other end takes nothing for so long is closed (Linux)


class BrokerServer:
    """Binds, then `run`s until told to stop.

    What bounds memory: libzmq closes the connection of a peer that sends a part above `maxmsgsize`, holds at most
    `RECEIVE_AHEAD` messages per peer, and refuses to hold more than `SEND_AHEAD` for one. It does not bound the
    number of parts of a message, nor their sum, and hands a message over when all of it is there: a peer with a key
    of the run could fill memory with one endless message. What is bounded here is what such a message costs after
    that: parts beyond the limits are dropped one by one, unread, and the message is a bad frame.

    quota_hours: asked before slots are granted; None: at all hours.
    """

    def __init__(
        self,
        service: BrokerService,
        keys: RunKeys,
        max_frame_bytes: int = 64 << 20,
        quota_hours: QuotaHours | None = None,
    ) -> None:
        self._service = service
        self._quota_hours = quota_hours
        self._roles = {key: cast(m.Role, name) for name, key in keys.public.items() if name != "broker"}
        self.dropped_messages = 0
        self._max_message_bytes = 4 * max_frame_bytes  # the largest part comes in two of four frames of a rollout
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._allow_list = AllowList(self._context, keys.allow_list)
        self._allow_list.__enter__()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.maxmsgsize = max_frame_bytes
        self._socket.router_handover = True
        self._socket.router_mandatory = True
        self._socket.rcvhwm = RECEIVE_AHEAD
        self._socket.sndhwm = SEND_AHEAD
        self._socket.setsockopt(zmq.TCP_MAXRT, UNREAD_FOR_S * 1000)
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
                if self._quota_hours is not None:
                    self._service.quota.keep_closed(*self._quota_hours(), time.monotonic())
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
            identity = self._socket.recv(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        first = self._socket.recv(copy=False)  # the rest of a message is there when its beginning is
        sender = self._sender(identity, first)
        if sender is None or self._service.banned(*sender, time.monotonic()):
            self.dropped_messages += 1
            self._skip(first)
            return True
        try:
            payload = self._payload(first)
            message = m.decode(first.buffer, m.AnyToBroker)
        except m.MessageError as error:
            self._send_all(self._service.bad_frame(*sender, str(error), time.monotonic()))
        else:
            self._send_all(self._service.handle(*sender, message, payload, time.monotonic()))
        return True

    def _sender(self, identity: zmq.Frame, first: zmq.Frame) -> tuple[str, m.Role] | None:
        """Name and role of who sent a message; None where there is no answering: a broken name, a foreign key."""
        role = self._roles.get(cast(str, first.get("User-Id")).encode())
        try:
            return None if role is None else (identity.bytes.decode(), role)
        except UnicodeDecodeError:
            return None

    def _payload(self, last: zmq.Frame) -> m.Payload:
        """The parts of a message after its first.

        Raises:
            MessageError: too many or too large. What is left is read and dropped.
        """
        parts: list[zmq.Frame] = []
        size = 0
        while last.more:
            last = self._socket.recv(copy=False)
            parts.append(last)
            size += len(last)
            if len(parts) > MAX_FRAMES - 2 or size > self._max_message_bytes:
                self._skip(last)
                raise m.MessageError(
                    f"a message has at most {MAX_FRAMES - 2} payload frames and {self._max_message_bytes} bytes"
                )
        return cast(m.Payload, parts)  # a Frame is a buffer, and when it is sent again its memory is shared

    def _skip(self, last: zmq.Frame) -> None:
        while last.more:
            last = self._socket.recv(copy=False)

    def _send_all(self, outgoing: list[Outgoing]) -> None:
        send = self._socket.send
        for peer, message, payload in outgoing:
            try:
                send(peer.encode(), MORE)  # fails here or not at all
                send(m.encode(message), MORE if payload else LAST)
                for frame in payload[:-1]:
                    send(frame, MORE)
                if payload:
                    send(payload[-1], LAST)
            except zmq.ZMQError as error:
                logger.debug("cannot send %s to %s: %s", type(message).__name__, peer, error)
                self._service.unreachable(peer)
                self._service.undelivered(message, time.monotonic())
