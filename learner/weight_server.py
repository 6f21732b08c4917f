"""Serves published policy versions to actors, from a thread of the learner's rank 0."""

from __future__ import annotations

import logging
import mmap
import threading
from pathlib import Path

import zmq

from common import weights as w
from common.messages import MessageError, decode, encode
from common.transport.keys import AllowList, RunKeys, secure_server

logger = logging.getLogger(__name__)


class WeightServer:
    """A ROUTER socket over the newest few snapshot files. Older files are deleted.

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
        self._stop = threading.Event()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._allow_list = AllowList(self._context, [keys.public["actor"]])
        self._allow_list.__enter__()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.maxmsgsize = 4096
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
            peer, *frames = self._socket.recv_multipart()
            try:
                if len(frames) != 1:
                    raise MessageError(f"a weight request is 1 frame, not {len(frames)}")
                self._answer(peer, decode(frames[0], w.ChunkRequest))
            except MessageError as error:
                logger.warning("dropped a request for weights: %s", error)

    def _answer(self, peer: bytes, request: w.ChunkRequest) -> None:
        with self._lock:
            mapped = self._files.get(request.version)
            newest = max(self._files, default=0)
        if mapped is None:
            self._socket.send_multipart([peer, encode(w.VersionGone(request.version, newest))])
            return
        chunk = memoryview(mapped)[request.offset : request.offset + w.CHUNK_BYTES]
        header = encode(w.Chunk(request.version, request.offset, len(mapped)))
        self._socket.send_multipart([peer, header, chunk], copy=False)
