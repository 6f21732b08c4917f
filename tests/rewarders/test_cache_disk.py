"""The file of results: several processes, age, bounds, damage, a full disk, kill -9."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewarders.cache.disk import DiskResults
from rewarders.cache.found import Refusal, decode_found, encode_found
from rewarders.cache.key import SearchKey
from rewarders.cache.table import Row, SearchTable
from rewarders.engines.base import SearchRequest, SearchResult

TEXT = st.text(max_size=30)  # with lone surrogates: JSON can hold them
NUMBERS = SearchResult(tuple(str(10_000_000 + 37 * number) for number in range(9999)), 123_456, "translated", ("odd",))


def key(term: str, version: str = "v1") -> SearchKey:
    return SearchKey("pubmed", version, SearchRequest(term, retmax=100))


def found(*ids: str) -> SearchResult:
    return SearchResult(ids, len(ids))


class Clock:
    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        return self.now


async def opened(folder: Path, **options: Any) -> DiskResults:
    disk = DiskResults(folder, **options)
    await disk.start()
    return disk


async def kept(folder: Path, *terms: str, **options: Any) -> list[str]:
    """Those of the terms that a process which starts now finds."""
    disk = await opened(folder, **options)
    try:
        return [term for term in terms if await disk.get(key(term)) is not None]
    finally:
        await disk.close()


@given(st.lists(TEXT, max_size=5), st.integers(0, 10), TEXT, st.lists(TEXT, max_size=2), st.booleans())
def test_what_was_found_comes_back_unchanged(
    ids: list[str], count: int, said: str, warnings: list[str], texts: bool
) -> None:
    about = tuple(f"about {name}" for name in ids) if texts else None
    result = SearchResult(tuple(ids), count, said, tuple(warnings), about, about)
    try:
        said.join((*ids, *warnings)).encode()
    except UnicodeEncodeError:
        back = decode_found(encode_found(result))
        assert isinstance(back, SearchResult)
        assert (len(back.ids), back.count) == (len(ids), count)
    else:
        assert decode_found(encode_found(result)) == result
        assert decode_found(encode_found(Refusal(said))) == Refusal(said)


@given(st.binary(max_size=60), st.integers(0, 80))
def test_no_bytes_from_elsewhere_do_harm(garbage: bytes, cut: int) -> None:
    whole = encode_found(found(*"abc"))
    for data in (garbage, b"\x00" + garbage, b"\x01" + garbage, whole[:cut] + garbage):
        with contextlib.suppress(ValueError):
            decode_found(data)


def test_a_large_result_is_compact() -> None:
    assert len(encode_found(NUMBERS)) < 50_000


def test_keys_differ_in_everything_the_result_depends_on() -> None:
    base = SearchRequest("heart attack", 10)
    requests = [
        base,
        SearchRequest("heart  Attack", 10),
        SearchRequest("heart attack", 11),
        SearchRequest("heart attack", 10, "relevance"),
        SearchRequest("heart attack", 10, min_date="2020"),
        SearchRequest("heart attack", 10, max_date="2020"),
        SearchRequest("heart attack", 10, with_texts=True),
        SearchRequest("heart \ud800", 10),
    ]
    keys = [SearchKey(source, version, asked) for source in "ab" for version in "cd" for asked in requests]
    assert len({one.digest for one in keys}) == len(keys)
    assert SearchKey("a", "c", SearchRequest(" heart\n attack ", 10)).digest == SearchKey("a", "c", base).digest
    assert all(one.readable.isascii() and "\n" not in one.readable for one in keys)


async def test_results_and_refusals_outlive_the_process(tmp_path: Path) -> None:
    disk = await opened(tmp_path)
    assert await disk.get(key("a")) is None
    disk.put(key("a"), NUMBERS)
    disk.put(key("b"), Refusal("unbalanced"))
    await disk.close()
    again = await opened(tmp_path)
    assert await again.get(key("a")) == NUMBERS
    assert await again.get(key("b")) == Refusal("unbalanced")
    assert await again.get(key("a", "v2")) is None, "other data, other results"
    await again.close()
    assert [path.name for path in tmp_path.glob("*.sqlite*")] == ["searches-1.sqlite", "searches-1.sqlite.lock"]


async def test_two_processes_see_what_either_found(tmp_path: Path) -> None:
    one, two = await opened(tmp_path), await opened(tmp_path)
    one.put(key("a"), found("1"))
    two.put(key("b"), found("2"))
    async with asyncio.timeout(30):
        while await two.get(key("a")) is None or await one.get(key("b")) is None:
            await asyncio.sleep(0.01)
    await one.close()
    await two.close()


async def test_age_counts_only_where_the_data_has_no_version(tmp_path: Path) -> None:
    clock = Clock()
    disk = await opened(tmp_path, max_age_s=3600.0, now=clock)
    for version in ("", "v1"):
        disk.put(key("a", version), found("old"))
    await disk.close()
    disk = await opened(tmp_path, max_age_s=3600.0, now=clock)
    clock.now += 3599.0
    assert await disk.get(key("a", "")) == found("old")
    clock.now += 1.0
    assert await disk.get(key("a", "")) is None
    assert await disk.get(key("a", "v1")) == found("old")
    disk.put(key("a", ""), found("new"))
    await disk.close()
    disk = await opened(tmp_path, max_age_s=3600.0, now=clock)
    assert await disk.get(key("a", "")) == found("new")
    clock.now -= 7200.0  # a clock set back: nobody knows how old it is
    assert await disk.get(key("a", "")) is None
    await disk.close()


async def test_what_was_unused_for_longest_goes_first(tmp_path: Path) -> None:
    clock = Clock()
    terms = [f"t{number}" for number in range(20)]
    disk = await opened(tmp_path, max_bytes=5_000, now=clock)
    for term in terms[:10]:
        clock.now += 10_000
        disk.put(key(term), found("1"))
    await disk.close()
    disk = await opened(tmp_path, max_bytes=5_000, now=clock)
    clock.now += 10_000
    assert await disk.get(key("t0")) is not None
    for term in terms[10:]:
        clock.now += 10_000
        disk.put(key(term), found("1"))
        await asyncio.wait_for(settled(disk), 30)
    await disk.close()
    assert SearchTableOf(disk).bytes() <= 5_000
    left = await kept(tmp_path, *terms, max_bytes=5_000, now=clock)
    assert left[0] == "t0", "used again, so not the oldest"
    assert set(terms[-5:]) <= set(left)
    assert len(left) < len(terms)


class SearchTableOf:
    """What a closed file holds."""

    def __init__(self, disk: DiskResults) -> None:
        self._table = SearchTable(disk.path, read_only=True)

    def bytes(self) -> int:
        self._table.open()
        try:
            return self._table.bytes
        finally:
            self._table.close()


async def settled(disk: DiskResults) -> None:
    """Everything put is written."""
    assert disk._thread is not None
    while disk._thread.waiting:
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("damage", ["garbage", "pages", "empty schema"])
async def test_a_damaged_file_is_set_aside_and_begun_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    disk = await opened(tmp_path)
    for number in range(300):
        disk.put(key(f"a{number}"), SearchResult(tuple(f"{number}-{n}" for n in range(200)), 200))
    await disk.close()
    content = bytearray(disk.path.read_bytes())
    match damage:
        case "garbage":
            disk.path.write_bytes(b"no database at all" * 1000)
        case "pages":
            content[4096:] = os.urandom(len(content) - 4096)
            disk.path.write_bytes(content)
        case "empty schema":
            content[100:4096] = bytes(3996)
            disk.path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        disk = await opened(tmp_path)
        for number in range(0, 300, 50):
            await disk.get(key(f"a{number}"))
        disk.put(key("b"), found("2"))
        await disk.close()
    assert len(caplog.records) == 1
    assert "damaged" in caplog.text
    assert len(list(tmp_path.glob("*.damaged-*"))) == 1
    assert await kept(tmp_path, "b") == ["b"]


async def test_a_file_damaged_under_two_processes_is_replaced_once(tmp_path: Path) -> None:
    one, two = await opened(tmp_path), await opened(tmp_path)
    one.put(key("a"), found("1"))
    await settled(one)
    await asyncio.to_thread(checkpoint, one.path)
    with one.path.open("r+b") as file:
        file.write(os.urandom(one.path.stat().st_size))
    for disk, term in ((one, "b"), (two, "c")):
        for _ in range(3):
            await disk.get(key("a"))
        disk.put(key(term), found("2"))
        await settled(disk)
    assert one.usable
    assert two.usable
    await one.close()
    await two.close()
    assert len(list(tmp_path.glob("*.damaged-*"))) == 1
    assert await kept(tmp_path, "b", "c") == ["b", "c"], "the second process joins the first one's new file"


def checkpoint(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    connection.close()


async def test_on_a_full_disk_the_run_goes_on_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk = await opened(tmp_path)
    disk.put(key("a"), found("1"))
    await settled(disk)
    assert disk._thread is not None
    await disk._thread.run(lambda table: table.connection.execute("PRAGMA max_page_count = 8").fetchall())
    with caplog.at_level(logging.WARNING):
        for number in range(20):
            disk.put(key(f"b{number}"), NUMBERS)
            await settled(disk)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "full" in caplog.text
    assert await disk.get(key("a")) == found("1"), "what is there is read still"
    await disk.close()


async def test_where_no_file_can_be_the_run_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        disk = await opened(tmp_path / "file")
        disk.put(key("a"), found("1"))
        assert await disk.get(key("a")) is None
        await disk.close()
    assert not disk.usable
    assert len(caplog.records) == 1


def test_a_process_killed_while_it_writes_leaves_a_whole_file(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from rewarders.cache.table import Row, SearchTable\n"
        "table = SearchTable(Path(sys.argv[1])); table.open(); number = 0\n"
        "while True:\n"
        "    rows = [Row(b'%d.%d' % (number, n), bytes(5000), 'q', 0.0, 0.0) for n in range(20)]\n"
        "    table.replace(rows); number += 1\n"
        "    print(number, flush=True)\n"
    )
    path = tmp_path / "killed.sqlite"
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(20):
        last = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    written = max([last, *(int(line) for line in process.stdout.read().split("\n")[:-1] if line)])
    process.wait()
    process.stdout.close()
    table = SearchTable(path)
    table.open()
    assert table.connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert table.rows >= written * 20, "what was said to be written is there"
    assert table.rows % 20 == 0, "all of a batch or nothing"
    table.add([Row(b"0.0", b"other", "q", 0.0, 0.0)])
    first = table.get(b"0.0")
    assert first is not None
    assert first.value == bytes(5000), "the first answer stays"
    table.close()
