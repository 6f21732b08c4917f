"""A client's connection to the broker: one socket, bounded both ways, made anew where libzmq gives it up."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import cast

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from common.transport.keys import RunKeys, secure_client

logger = logging.getLogger(__name__)

MAX_FRAMES = 7  # of a message from the broker: what it says, and a scored group
LARGEST_PARTS = 6  # ticket, rollout (4 frames) and scores may each be of the largest size
LINGER_S = 1.0
AHEAD = 256  # messages that libzmq holds in each direction
MAX_WAITING = 4096  # messages that wait for libzmq, beyond which nothing more is read
RETRIES_WITHIN_MS = 2000  # libzmq says at once that it will connect again; after so long it will not

EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED

_Frames = list[bytes | memoryview]


class BrokerLine:
    """A DEALER under CURVE. Sending never blocks and never loses a message of a connection that lasts.

    What bounds memory: libzmq closes the connection over a part above `max_frame_bytes`, and holds `AHEAD` messages
    in each direction. What does not fit there waits here, counted in messages and bytes. While more than `MAX_WAITING`
    messages, or more bytes than one message may have, wait, nothing is read: so what a peer owes for what it has
    already read is all that can be added. This cannot lock up, because the broker reads whether it is read or not.

    on_connected: called on every connection but the first, when what was on its way before may be lost.
    """

    def __init__(
        self, endpoint: str, keys: RunKeys, name: str, max_frame_bytes: int, on_connected: Callable[[], None]
    ) -> None:
        self.endpoint = endpoint
        self.dropped = 0  # messages of the broker beyond the limits
        self.waiting_bytes = 0
        self._name = name
        self._on_connected = on_connected
        self._max_frame_bytes = max_frame_bytes
        self._max_message_bytes = LARGEST_PARTS * max_frame_bytes
        self._waiting: OrderedDict[str | int, _Frames] = OrderedDict()
        self._numbers = itertools.count()
        self._to_send = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._tasks: list[asyncio.Task[None]] = []
        self._context = zmq.asyncio.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.identity = name.encode()
        self.socket.linger = int(LINGER_S * 1000)
        self.socket.maxmsgsize = max_frame_bytes
        self.socket.sndhwm = self.socket.rcvhwm = AHEAD
        self.socket.reconnect_ivl = 100
        self.socket.reconnect_ivl_max = 2000
        secure_client(self.socket, keys, keys.public["broker"])
        self._events = self.socket.get_monitor_socket(EVENTS)

    @property
    def waiting(self) -> int:
        """Messages that libzmq has not taken yet."""
        return len(self._waiting)

    def open(self) -> None:
        """Connect, and stay connected."""
        self.socket.connect(self.endpoint)
        self._tasks = [asyncio.create_task(loop) for loop in (self._send_loop(), self._connection_loop())]

    async def close(self) -> None:
        """Send what waits, for a moment at most, and disconnect."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while self._waiting:
                    await asyncio.sleep(0.01)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.socket.disable_monitor()
        self._events.close(linger=0)
        self.socket.close()
        self._context.term()

    def send(self, frames: _Frames, newest_of: str = "") -> None:
        """Hand a message over, in order. With `newest_of` it takes the place of one of that kind that still waits."""
        if not self._waiting and self._hand_over(frames):
            return
        key: str | int = newest_of or next(self._numbers)
        self._forget(key)
        self._waiting[key] = frames
        self.waiting_bytes += sum(map(len, frames))
        self._note_room()
        self._to_send.set()

    def waits(self, kind: str) -> bool:
        """Whether a message sent as the newest of its kind has not gone yet."""
        return kind in self._waiting

    async def receive(self) -> list[memoryview]:
        """The frames of the next message within the limits."""
        while True:
            await self._room.wait()
            frames = await self.socket.recv_multipart(copy=False)
            if len(frames) <= MAX_FRAMES and sum(map(len, frames)) <= self._max_message_bytes:
                return [frame.buffer for frame in frames]
            self.dropped += 1
            logger.error("dropped a message from the broker: %d frames, more than it may have", len(frames))

    # ------------------------------------------------------------------ internals

    def _hand_over(self, frames: _Frames) -> bool:
        copy = len(frames) == 1  # the payload of a result is worth sharing, a control message is not
        sending = cast(asyncio.Future[object], self.socket.send_multipart(frames, zmq.NOBLOCK, copy=copy))
        if isinstance(sending.exception(), zmq.Again):  # done on return: NOBLOCK
            return False
        sending.result()
        return True

    def _forget(self, key: str | int) -> None:
        self.waiting_bytes -= sum(map(len, self._waiting.pop(key, ())))

    def _note_room(self) -> None:
        if len(self._waiting) > MAX_WAITING or self.waiting_bytes > self._max_message_bytes:
            self._room.clear()
        else:
            self._room.set()

    async def _send_loop(self) -> None:
        while True:
            await self._to_send.wait()
            while self._waiting:
                key, frames = next(iter(self._waiting.items()))
                if self._hand_over(frames):
                    self._forget(key)
                    self._note_room()
                else:
                    await self.socket.poll(None, zmq.POLLOUT)  # type: ignore[call-arg]
            self._to_send.clear()

    async def _connection_loop(self) -> None:
        """libzmq connects again by itself, and tells neither side; but not where the other end broke the protocol,
        as by a frame above the limit."""
        first, lost = True, False
        while True:
            if lost and not await self._events.poll(RETRIES_WITHIN_MS):
                self._connect_anew()
            event = parse_monitor_message(await self._events.recv_multipart())["event"]
            lost = event == zmq.EVENT_DISCONNECTED
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                if not first:
                    logger.info("%s is connected to the broker again", self._name)
                    self._on_connected()
                first = False

    def _connect_anew(self) -> None:
        logger.error(
            "the broker broke the protocol, perhaps by a frame above %d MiB (broker.max_frame_mib): connecting anew",
            self._max_frame_bytes >> 20,
        )
        self.socket.disconnect(self.endpoint)
        self.socket.connect(self.endpoint)
