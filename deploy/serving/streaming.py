"""A streamed answer: lines of JSON with what is being generated, and with the rewrites as they are finished."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from functools import partial
from typing import Any

from actors.engine import TextListener
from deploy.serving.wire import GrownText, NumberedRewrite

Work = Coroutine[Any, Any, list[NumberedRewrite]]


class RewriteStream:
    """The lines of one request to the server.

    Between two looks of the client only the newest text of a sample is kept, so a client that reads slowly gets longer
    pieces, not more of them.
    """

    def __init__(self) -> None:
        self._news = asyncio.Event()
        self._texts: dict[tuple[int, int], str] = {}
        self._told: dict[tuple[int, int], str] = {}

    def listener(self, index: int) -> TextListener:
        """What is to be told how the samples of a request grow."""
        return partial(self._note, index)

    async def lines(self, works: Sequence[Work]) -> AsyncGenerator[str, None]:
        """Until all works are done; ends those that are left where it is closed or one of them fails.

        Raises:
            whatever a work raises.
        """
        tasks = [asyncio.create_task(work) for work in works]
        for task in tasks:
            task.add_done_callback(lambda _: self._news.set())
        left = list(tasks)
        try:
            while left:
                await self._news.wait()
                self._news.clear()
                # Together, before anything else can run: a rewrite comes after all that was told of it.
                finished, grown = [task for task in left if task.done()], self._grown()
                left = [task for task in left if task not in finished]
                for text in grown:
                    yield text.model_dump_json() + "\n"
                for rewrite in (each for task in finished for each in task.result()):
                    yield rewrite.model_dump_json() + "\n"
        finally:
            for task in tasks:
                task.cancel()

    def _note(self, index: int, sample: int, text: str) -> None:
        self._texts[index, sample] = text
        self._news.set()

    def _grown(self) -> list[GrownText]:
        """What nobody was told yet."""
        texts, self._texts = self._texts, {}
        grown = []
        for (index, sample), text in texts.items():
            told = self._told.get((index, sample), "")
            anew = not text.startswith(told)
            if text != told:
                grown.append(GrownText(index=index, sample=sample, text=text if anew else text[len(told) :], anew=anew))
        self._told |= texts
        return grown
