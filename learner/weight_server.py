"""Serves published policy versions to actors, from a thread of the learner's rank 0."""

from __future__ import annotations

import logging
import mmap
import threading
import time
from pathlib import Path

import zmq

from common import weights as w
from common.broker.conduct import Conduct, Source
from common.messages import MessageError, decode, encode
from common.transport.keys import AllowList, RunKeys, secure_server

logger = logging.getLogger(__name__)

REQUEST_BYTES = 4096  # of a request, under CURVE
REQUESTS_AHEAD = 64  # of one actor that libzmq holds before it stops reading from its connection
CHUNKS_AHEAD = 4 * w.CHUNKS_IN_FLIGHT  # to one actor that libzmq holds; what an actor asks for beyond it is not sent
BAD_REQUESTS_ALLOWED = 8
BAN_S = 60.0
REMEMBERED = 4096  # connections
UNREAD_FOR_S = 60  # a connection whose other end takes nothing for so long is closed (Linux)


class WeightServer:
    """A ROUTER socket over the newest few snapshot files. Older files are deleted.

    Actors of the run are served and nobody else. A connection that sends bad requests is not listened to for `BAN_S`
    after a few; what libzmq holds for one is bounded in requests and in chunks, and chunks are pages of the file.

    Args:
        directory: where snapshots are written (`path_of`).
        keep: versions kept, so that a pull that is under way when a new version appears can end.
    """

    def __init__(self, directory: Path, keys: RunKeys, host: str, keep: int = 3) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob("*.safetensors*"):
            leftover.unlink()
        self._directory = directory
        self._keep = keep
        self._files: dict[int, mmap.mmap] = {}
        self._lock = threading.Lock()
        self.handled_requests = self.rejected_requests = self.dropped_requests = 0
        self.conduct = Conduct(BAD_REQUESTS_ALLOWED, BAN_S, ask_every_s=BAN_S, remembered=REMEMBERED)
        self._stop = threading.Event()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._allow_list = AllowList(self._context, [keys.public["actor"]])
        self._allow_list.__enter__()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.maxmsgsize = REQUEST_BYTES
        self._socket.rcvhwm = REQUESTS_AHEAD
        self._socket.sndhwm = CHUNKS_AHEAD
        self._socket.setsockopt(zmq.TCP_MAXRT, UNREAD_FOR_S * 1000)
        self._socket.linger = 0
        secure_server(self._socket, keys)
        self.endpoint = f"tcp://{host}:{self._socket.bind_to_random_port(f'tcp://{host}')}"
        self._thread = threading.Thread(target=self._serve, name="weight-server", daemon=True)
        self._thread.start()

    def path_of(self, version: int) -> Path:
        """Where the snapshot of a version belongs."""
        return self._directory / f"{version:08d}.safetensors"

    def publish(self, version: int) -> None:
        """Serve `path_of(version)`, which must be complete; forget versions beyond `keep`."""
        with self.path_of(version).open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with self._lock:
            self._files[version] = mapped
            gone = sorted(self._files)[: -self._keep]
            for old in gone:
                del self._files[old]  # unmapped when the last chunk being sent is done
        for old in gone:
            self.path_of(old).unlink(missing_ok=True)

    def close(self) -> None:
        """Stop serving."""
        self._stop.set()
        self._thread.join()
        self._socket.close()
        self._allow_list.__exit__()
        self._context.term()

    def _serve(self) -> None:
        while not self._stop.is_set():
            if not self._socket.poll(100):
                continue
            peer = self._socket.recv()
            parts = [self._socket.recv()]  # the rest of a message is there when its beginning is
            while self._socket.getsockopt(zmq.RCVMORE):
                parts[1:] = [self._socket.recv()]  # one more than a request has: the others are not kept
            self._handle(peer, parts, time.monotonic())

    def _handle(self, peer: bytes, parts: list[bytes], now: float) -> None:
        source: Source = ("actor", peer.hex())
        if self.conduct.banned(source, now):
            self.dropped_requests += 1
            return
        try:
            if len(parts) != 1:
                raise MessageError("a weight request is one frame")
            self._answer(peer, decode(parts[0], w.ChunkRequest))
            self.handled_requests += 1
        except MessageError as error:
            self.rejected_requests += 1
            if self.conduct.bad_frame(source, now):
                logger.warning("an actor's connection is ignored for %g s, its requests are bad: %s", BAN_S, error)

    def _answer(self, peer: bytes, request: w.ChunkRequest) -> None:
        with self._lock:
            mapped = self._files.get(request.version)
            newest = max(self._files, default=0)
        if mapped is None:
            self._socket.send_multipart([peer, encode(w.VersionGone(request.version, newest))])
            return
        if request.offset >= len(mapped):
            raise MessageError(f"version {request.version} has {len(mapped)} bytes, none at {request.offset}")
        chunk = memoryview(mapped)[request.offset : request.offset + w.CHUNK_BYTES]
        header = encode(w.Chunk(request.version, request.offset, len(mapped)))
        self._socket.send_multipart([peer, header, chunk], copy=False)
