"""API keys in files: only their owner may read them, and no request leaves without."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewarders.engines.api_keys import ApiKeyError, key_from_environment, key_from_file
from rewarders.engines.base import SearchRequest
from tests.rewarders.fake_ncbi import FakeNcbi
from tests.rewarders.fake_upstream import running
from tests.rewarders.recording_permit import recording

KEY = "0a1b2c3d4e5f"
SEARCH = SearchRequest("a", retmax=3)


def key_file(folder: Path, content: bytes = KEY.encode() + b"\n", mode: int = 0o600) -> str:
    path = folder / "ncbi.key"
    path.write_bytes(content)
    path.chmod(mode)
    return str(path)


def test_a_private_file_gives_its_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = key_file(tmp_path)
    assert key_from_file(path) == KEY
    monkeypatch.setenv("HOME", str(tmp_path))
    assert key_from_file("~/ncbi.key") == KEY
    Path(path).chmod(0o400)
    assert key_from_file(path) == KEY


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_file_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = key_file(tmp_path, mode=mode)
    with pytest.raises(ApiKeyError, match=f"can be read by others: chmod 600 {path}$"):
        key_from_file(path)


@pytest.mark.parametrize("content", [b"", b" \n", b"one\ntwo\n", b"key = 0a1b2c", b"\xff\xfe0a", b"k" * 2000 + b"\0"])
def test_what_is_no_key_is_refused_and_not_quoted(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ApiKeyError, match="must hold one API key") as raised:
        key_from_file(key_file(tmp_path, content))
    assert "0a1b2c" not in str(raised.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ApiKeyError, match=r"cannot read the API key in .*none: No such file"):
        key_from_file(str(tmp_path / "none"))


def test_no_variable_and_a_blank_one_are_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "  ")
    assert key_from_environment(None) == key_from_environment("SOME_KEY") == key_from_environment("NO_SUCH_KEY") == ""


async def test_the_file_stands_in_for_the_variable_and_may_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_KEY", "of-the-environment")
    path = key_file(tmp_path)
    async with running(FakeNcbi()) as ncbi, ncbi.engine(api_key_env="TEST_KEY", api_key_file=path) as engine:
        await engine.search(SEARCH)
        key_file(tmp_path, b"another-key")
        await engine.search(SEARCH)
        assert KEY not in repr(engine) + repr(vars(engine))
    assert [form["api_key"] for form in ncbi.received] == [KEY, "another-key"]


async def test_without_its_key_nothing_is_asked_and_the_slot_is_given_back(tmp_path: Path) -> None:
    events: list[str] = []
    path = key_file(tmp_path)
    async with running(FakeNcbi()) as ncbi:
        async with ncbi.engine(api_key_file=path, permit=recording(ncbi, events)) as engine:
            Path(path).unlink()
            with pytest.raises(ApiKeyError):
                await engine.search(SEARCH)
        assert ncbi.received == []
    assert events == ["granted before request 1", "unused"]
