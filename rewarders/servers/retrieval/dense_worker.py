"""The process of a dense index: `python -m rewarders.servers.retrieval.dense_worker`, frames on its standard streams.

torch, transformers and faiss live here and nowhere else in the rewarders.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from common.data.beir import DataError
from rewarders.frames import frame, read_frame, write_all
from rewarders.servers.hosting import SearchServerError
from rewarders.servers.retrieval.dense_wire import Failed, Found, Progress, Ready, Reply, Search, Setup
from rewarders.servers.retrieval.encoder_files import encoder_folder
from rewarders.servers.retrieval.passages import check_corpus

if TYPE_CHECKING:
    from rewarders.servers.retrieval.dense_index import Hits

_INPUT = 0


def main() -> int:
    """Serve until the backend closes the pipe."""
    # Ctrl-C reaches the whole process group, and the server may have searches to finish: it says when to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Whatever a library prints must not come between the frames.
    output = os.dup(1)
    os.dup2(2, 1)
    encoder = msgspec.msgpack.Encoder()

    def send(reply: Reply) -> None:
        write_all(output, frame(encoder.encode(reply)))

    received = read_frame(_INPUT)
    if received is None:
        return 0
    setup = msgspec.msgpack.decode(received, type=Setup)
    try:
        _check_files(setup)
        # Here, so that a missing package is an answer and not a traceback, and a wrong path is known at once.
        from rewarders.servers.retrieval.dense_index import open_index

        index = open_index(
            Path(setup.corpus),
            setup.settings,
            Path(setup.cache_folder),
            lambda done, total: send(Progress(done, total)),
        )
    except (DataError, SearchServerError, ImportError, MemoryError, ValueError) as error:
        send(_failure(error))
        return 1
    send(Ready(index.made.version, str(index.made.passages), index.made.encoded))
    decoder = msgspec.msgpack.Decoder(Search)
    while (received := read_frame(_INPUT)) is not None:
        search = decoder.decode(received)
        try:
            send(_found(search.number, index.search(search.terms, search.ks)))
        except (ValueError, RuntimeError, MemoryError) as error:
            send(Failed("search", _one_line(error), search.number))
    return 0


def _check_files(setup: Setup) -> None:
    """Raise DataError or SearchServerError for what can be told before seconds go into imports."""
    check_corpus(Path(setup.corpus))
    if setup.settings.encoder is not None:
        encoder_folder(setup.settings.encoder)


def _found(number: int, hits: list[Hits]) -> Found:
    lengths = [len(documents) for documents, _ in hits]
    documents, scores = (b"".join(array.tobytes() for array in arrays) for arrays in zip(*hits, strict=True))
    return Found(number, lengths, documents, scores)


def _failure(error: Exception) -> Failed:
    if isinstance(error, ImportError):
        missing = f"dense retrieval needs a package that is not here ({_one_line(error)}): pip install -e '.[dense]'"
        return Failed("start", missing)
    if isinstance(error, MemoryError):
        return Failed("start", "the dense index does not fit into memory: use a smaller encoder or another host")
    # DataError is a ValueError too: of other ValueErrors only the encoder's are known.
    return Failed("corpus" if isinstance(error, DataError) else "start", _one_line(error))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
