"""Pulls policy versions from the learner and checks every byte before an engine may load them."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import zmq
import zmq.asyncio

from common import weights as w
from common.messages import MessageError, RunState, decode, encode
from common.transport.keys import RunKeys, secure_client


class WeightTransferError(Exception):
    """A version could not be pulled; the next announcement is tried."""


class WeightReceiver:
    """Pulls one version at a time into a local file.

    Args:
        scratch: folder for the file; a memory-backed one (/dev/shm) spares the disk.
        timeout_s: longest silence of the learner in the middle of a transfer.
    """

    def __init__(self, keys: RunKeys, scratch: Path | None = None, timeout_s: float = 20.0) -> None:
        memory = Path("/dev/shm")
        base = scratch or (memory if memory.is_dir() else None)
        self._folder = tempfile.TemporaryDirectory(prefix="deepretrieval-weights-", dir=base)
        self._keys = keys
        self._timeout_s = timeout_s
        self._context = zmq.asyncio.Context()

    async def pull(self, state: RunState) -> Path:
        """Fetch the announced version; returns the file, valid until the next pull.

        Raises:
            WeightTransferError: the learner fell silent, dropped the version, or the checksum is wrong.
        """
        target = Path(self._folder.name) / f"{state.incarnation}-{state.version}.safetensors"
        for old in target.parent.glob("*.safetensors"):
            old.unlink()
        socket = self._context.socket(zmq.DEALER)
        socket.linger = 0
        socket.maxmsgsize = w.CHUNK_BYTES + 4096  # CURVE wraps each frame
        secure_client(socket, self._keys, state.weights_key.encode())
        socket.connect(state.weights_endpoint)
        try:
            await self._transfer(socket, state.version, target)
        finally:
            socket.close()
        checksum = await asyncio.to_thread(w.file_checksum, target)
        if checksum != state.checksum:
            raise WeightTransferError(
                f"version {state.version} arrived with checksum {checksum[:12]}…, announced was {state.checksum[:12]}…"
            )
        return target

    def close(self) -> None:
        """Remove the local files."""
        self._context.term()
        self._folder.cleanup()

    async def _transfer(self, socket: zmq.asyncio.Socket, version: int, target: Path) -> None:
        asked = received = 0
        total = 1  # known from the first chunk on
        with target.open("wb") as file:
            while received < total:
                while asked < total and asked - received < w.CHUNKS_IN_FLIGHT * w.CHUNK_BYTES:
                    await socket.send(encode(w.ChunkRequest(version, asked)))
                    asked += w.CHUNK_BYTES
                chunk, data = await self._next_chunk(socket, version)
                total = chunk.total
                if chunk.offset != received or len(data) != min(w.CHUNK_BYTES, total - received):
                    raise WeightTransferError(f"version {version}: the chunk at {chunk.offset} is out of order or cut")
                file.write(data)
                received += len(data)

    async def _next_chunk(self, socket: zmq.asyncio.Socket, version: int) -> tuple[w.Chunk, memoryview]:
        try:
            frames = await asyncio.wait_for(socket.recv_multipart(copy=False), self._timeout_s)
            answer = decode(frames[0].buffer, w.FromWeightServer)
        except TimeoutError:
            raise WeightTransferError(
                f"the learner sent nothing of version {version} for {self._timeout_s:.0f} s"
            ) from None
        except MessageError as error:
            raise WeightTransferError(f"version {version}: {error}") from None
        if isinstance(answer, w.VersionGone):
            raise WeightTransferError(f"version {version} is gone, the newest is {answer.newest}")
        if answer.version != version or len(frames) != 2:
            raise WeightTransferError(f"version {version}: an answer to something else arrived")
        return answer, frames[1].buffer
