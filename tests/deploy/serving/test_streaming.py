"""The lines of a streamed answer."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from deploy.serving.streaming import RewriteStream, Work
from deploy.serving.wire import NumberedRewrite


async def rewritten(index: int, told: RewriteStream, texts: list[str], turns: int = 1) -> list[NumberedRewrite]:
    """Grows through the texts, giving others so many turns after each."""
    for text in texts:
        told.listener(index)(0, text)
        for _ in range(turns):
            await asyncio.sleep(0)
    return [NumberedRewrite(index=index, sample=0, request="r", task="t", query="q", text=texts[-1])]


async def lines_of(stream: RewriteStream, works: list[Work]) -> list[dict[str, Any]]:
    return [json.loads(line) async for line in stream.lines(works)]


async def test_what_grew_since_the_last_line_and_then_the_rewrite() -> None:
    stream = RewriteStream()
    lines = await lines_of(stream, [rewritten(0, stream, ["a", "ab", "abc"], turns=9)])
    assert [line["text"] for line in lines] == ["a", "b", "c", "abc"]
    assert [line.get("anew") for line in lines] == [False, False, False, None]
    assert lines[-1]["query"] == "q"


async def test_a_text_that_does_not_go_on_begins_anew() -> None:
    stream = RewriteStream()
    lines = await lines_of(stream, [rewritten(0, stream, ["one", "two", "two"], turns=9)])
    assert [(line["text"], line.get("anew")) for line in lines] == [("one", False), ("two", True), ("two", None)]


async def test_a_client_that_reads_slowly_gets_longer_pieces() -> None:
    stream = RewriteStream()
    lines = stream.lines([rewritten(0, stream, ["a" * length for length in range(1, 1001)])])
    first = json.loads(await anext(lines))
    await asyncio.sleep(0.2)  # all of it grows meanwhile
    rest = [json.loads(line) async for line in lines]
    assert len(rest) <= 3
    assert first["text"] + "".join(line["text"] for line in rest[:-1]) == rest[-1]["text"] == "a" * 1000


async def test_a_failure_ends_the_others() -> None:
    stream = RewriteStream()
    ended = asyncio.Event()

    async def fails() -> list[NumberedRewrite]:
        raise RuntimeError("gone")

    async def waits() -> list[NumberedRewrite]:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()
        return []

    with pytest.raises(RuntimeError, match="gone"):
        await lines_of(stream, [waits(), fails()])
    await asyncio.wait_for(ended.wait(), 1)
