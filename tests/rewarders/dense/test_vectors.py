from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from common.data.beir import DataError
from rewarders.servers.retrieval.sealed import is_sealed, locked, seal
from rewarders.servers.retrieval.vectors import BLOCK_ROWS, ensure_vectors, read_vectors

ROWS = 2 * BLOCK_ROWS + 300
DIMENSION = 3


class _Encoder:
    """A text is its number; counts what it is given, fails after so many blocks."""

    def __init__(self, blocks: int = 1000) -> None:
        self.blocks = blocks
        self.seen = 0

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        if self.blocks == 0:
            raise KeyboardInterrupt
        self.blocks -= 1
        self.seen += len(texts)
        return np.array([[int(text), -int(text), 0.5] for text in texts], np.float32)


def _ensure(path: Path, encoder: _Encoder, progress: list[int] | None = None) -> int:
    def report(done: int, total: int) -> None:
        assert total == ROWS
        if progress is not None:
            progress.append(done)

    return ensure_vectors(path, ROWS, DIMENSION, lambda: map(str, range(ROWS)), encoder, report)


def _check(path: Path) -> None:
    vectors = read_vectors(path)
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors[:, 0], np.arange(ROWS))
    assert vectors.shape == (ROWS, DIMENSION)


def test_vectors_are_written_once_with_progress(tmp_path: Path) -> None:
    progress: list[int] = []
    assert _ensure(tmp_path / "a.npy", _Encoder(), progress) == ROWS
    assert progress == [0, BLOCK_ROWS, 2 * BLOCK_ROWS, ROWS]
    _check(tmp_path / "a.npy")
    again = _Encoder()
    assert _ensure(tmp_path / "a.npy", again) == 0
    assert again.seen == 0


@pytest.mark.parametrize("tail", [b"", b"half a block that was being written" * 100])
def test_an_interrupted_build_goes_on_after_its_last_whole_block(tmp_path: Path, tail: bytes) -> None:
    with pytest.raises(KeyboardInterrupt):
        _ensure(tmp_path / "a.npy", _Encoder(blocks=2))
    with (tmp_path / "a.unfinished").open("ab") as file:
        file.write(tail)
    progress: list[int] = []
    rest = _Encoder()
    assert _ensure(tmp_path / "a.npy", rest, progress) == rest.seen == ROWS - 2 * BLOCK_ROWS
    assert progress[0] == 2 * BLOCK_ROWS
    _check(tmp_path / "a.npy")


def test_a_build_killed_before_its_seal_only_lacks_the_seal(tmp_path: Path) -> None:
    _ensure(tmp_path / "a.npy", _Encoder())
    (tmp_path / "a.npy").rename(tmp_path / "a.unfinished")
    encoder = _Encoder()
    assert _ensure(tmp_path / "a.npy", encoder) == encoder.seen == 0
    _check(tmp_path / "a.npy")


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-500] ^= 1
    path.write_bytes(data)


def _foreign(path: Path) -> None:
    np.save(path, np.ones((ROWS, DIMENSION), np.float32))


def _other_shape(path: Path) -> None:
    with (path.parent / "other").open("wb") as file:
        np.save(file, np.ones((ROWS, DIMENSION + 1), np.float32))
    seal(path.parent / "other", path)


@pytest.mark.parametrize("damage", [_truncate, _flip, _foreign, _other_shape, Path.unlink])
def test_a_damaged_or_foreign_file_is_made_again(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    _ensure(tmp_path / "a.npy", _Encoder())
    damage(tmp_path / "a.npy")
    assert _ensure(tmp_path / "a.npy", _Encoder()) == ROWS
    _check(tmp_path / "a.npy")


def test_an_unfinished_file_of_something_else_is_begun_again(tmp_path: Path) -> None:
    (tmp_path / "a.unfinished").write_bytes(b"something else" * 100_000)
    assert _ensure(tmp_path / "a.npy", _Encoder()) == ROWS
    _check(tmp_path / "a.npy")


def test_a_seal_without_its_file_counts_as_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    assert not is_sealed(tmp_path / "a")
    (tmp_path / "b").write_bytes(b"2")
    seal(tmp_path / "b", tmp_path / "a")
    assert is_sealed(tmp_path / "a")
    (tmp_path / "a").unlink()
    assert not is_sealed(tmp_path / "a")


def test_a_cache_folder_has_one_builder_at_a_time(tmp_path: Path) -> None:
    events: list[str] = []

    def build() -> None:
        with locked(tmp_path):
            events.append("second")

    with locked(tmp_path):
        second = threading.Thread(target=build)
        second.start()
        second.join(0.2)
        events.append("first")
    second.join()
    assert events == ["first", "second"]


def test_a_cache_that_cannot_be_written_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="name another folder"), locked(tmp_path / "file" / "cache"):
        pass
