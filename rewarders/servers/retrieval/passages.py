"""The passages of a BEIR folder as a dense index sees them: equal texts are one row."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from common.data.beir import CORPUS_FILE, DataError, Document, read_corpus
from rewarders.servers.retrieval.sealed import is_sealed, seal


def check_corpus(corpus: Path) -> None:
    """Raise DataError if there is no corpus file that can be read."""
    path = corpus / CORPUS_FILE
    try:
        path.open("rb").close()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): name a folder that holds {CORPUS_FILE}") from None


def passage_text(document: Document) -> str:
    """Title and text, as the encoders of the field are trained on them."""
    return _sound(f"{document.title} {document.text}".strip())


class Passages(msgspec.Struct, frozen=True):
    """Which document has which row of the index.

    Equal texts share a row: they tie exactly whatever the floats do, and are encoded once. Rows are numbered in the
    order in which their texts first occur. Documents are numbered in the order of their ids, so that ties go by number.
    ids: by number. numbers, rows: of the documents in the order of the corpus, int32 in this machine's byte order.
    Memory: some 70 bytes per document.
    """

    ids: list[str]
    numbers: bytes
    rows: bytes

    def number_of(self) -> NDArray[np.int32]:
        return np.frombuffer(self.numbers, np.int32)

    def row_of(self) -> NDArray[np.int32]:
        return np.frombuffer(self.rows, np.int32)

    @property
    def distinct(self) -> int:
        """Number of rows."""
        return int(self.row_of().max()) + 1


def ensure_passages(corpus: Path, path: Path) -> Passages:
    """The passages of a corpus: from the file at `path`, which is written if it is not there or damaged.

    Raises:
        DataError: the corpus is missing, empty or has a broken line.
        OSError: the file cannot be written.
    """
    if is_sealed(path):
        return read_passages(path)
    passages = _number(corpus)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_bytes(msgspec.msgpack.encode(passages))
    seal(unfinished, path)
    return passages


def read_passages(path: Path) -> Passages:
    """What `ensure_passages` has left there."""
    return msgspec.msgpack.decode(path.read_bytes(), type=Passages)


def distinct_texts(corpus: Path, passages: Passages) -> Iterator[str]:
    """The texts of the rows, in order. The corpus is read again, so that it need not be held."""
    following = 0
    for row, document in zip(passages.row_of().tolist(), read_corpus(corpus), strict=True):
        if row == following:
            following += 1
            yield passage_text(document)


def _sound(text: str) -> str:
    """JSON can spell half a character; tokenizers and MessagePack cannot."""
    return text.encode("utf-8", "replace").decode()


def _number(corpus: Path) -> Passages:
    ids: list[str] = []
    rows: list[int] = []
    row_of_text: dict[bytes, int] = {}
    for document in read_corpus(corpus):
        text = hashlib.blake2b(passage_text(document).encode(), digest_size=16).digest()
        ids.append(_sound(document.id))
        rows.append(row_of_text.setdefault(text, len(row_of_text)))
    if not ids:
        raise DataError(f"{corpus / CORPUS_FILE} holds no documents: name a folder with a corpus")
    by_id = sorted(range(len(ids)), key=ids.__getitem__)
    numbers = np.empty(len(ids), np.int32)
    numbers[by_id] = np.arange(len(ids), dtype=np.int32)
    return Passages([ids[place] for place in by_id], numbers.tobytes(), np.asarray(rows, np.int32).tobytes())
