"""The engine of docs/own_engine.md, as it stands there, against a tiny service."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from common.scores import InvalidOutput, Scored, Unavailable
from common.tasks import Row, load_task
from rewarders.engines.base import EngineMisconfigured, EngineThrottled, EngineUnavailable, SearchRequest
from rewarders.engines.permits import Slot
from rewarders.retry import Retrier, RetryPolicy
from tests.rewarders.recording_permit import Recorder
from tests.rewarders.search_scorer import search_scorer

PAGE = Path(__file__).parents[2] / "docs" / "own_engine.md"
BOOKS = {"b1": "the trial", "b2": "the castle", "b3": "trial and error"}


@dataclass
class Library:
    """A service that finds books by a word of their titles, or does what it is told to."""

    told: web.Response | None = None
    asked: list[str] = field(default_factory=list)

    async def find(self, request: web.Request) -> web.Response:
        self.asked.append(request.query["q"])
        if self.told is not None:
            return web.Response(status=self.told.status, body=self.told.body, headers=self.told.headers)
        if request.query["q"].count("(") != request.query["q"].count(")"):
            return web.Response(status=400, text="unbalanced parentheses")
        ids = [name for name, title in BOOKS.items() if request.query["q"] in title.split()]
        return web.json_response({"ids": ids[: int(request.query["limit"])], "total": len(ids)})


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The code of the page, imported as the module a reader would make of it."""
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    path = tmp_path_factory.mktemp("own") / "library_engine.py"
    path.write_text(code)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[path.stem]


@pytest.fixture
def library() -> Library:
    return Library()


@pytest.fixture
def events() -> list[str]:
    """What the quota hears."""
    return []


@pytest.fixture
async def engine(page: ModuleType, library: Library, events: list[str]) -> AsyncIterator[Any]:
    @asynccontextmanager
    async def permit() -> AsyncIterator[Slot]:
        yield Recorder(events)

    app = web.Application()
    app.router.add_get("/find", library.find)
    async with TestServer(app) as server:
        settings = page.LibrarySettings(base_url=str(server.make_url("/")), timeout_s=5.0)
        async with page.LibraryEngine(settings, permit=permit) as started:
            yield started


async def scored(engine: Any, query: str) -> Any:
    task = load_task("publication_search", reasoning=False)
    scorer = search_scorer(task, engine, retrier=Retrier(RetryPolicy(attempts=1)))
    row = Row("r", "Kafka's novel about a court", relevant=("b1", "b3"))
    return await scorer.score_text(task.answer_text(query), row)


async def test_a_good_query_is_paid_for_what_it_finds(engine: Any, library: Library) -> None:
    await engine.check()
    score = await scored(engine, "trial")
    assert isinstance(score, Scored)
    assert score.metrics["recall"] == 1.0
    assert library.asked == ["book", "trial"]


async def test_no_more_ids_than_wanted_and_all_matches_counted(engine: Any) -> None:
    found = await engine.search(SearchRequest("trial", retmax=1))
    assert (found.ids, found.count) == (("b1",), 2)


async def test_a_wrong_query_is_the_models_fault(engine: Any) -> None:
    score = await scored(engine, "(trial")
    assert isinstance(score, InvalidOutput)
    assert score.reward < 0


@pytest.mark.parametrize(
    ("status", "body", "raised"),
    [
        (503, "", EngineUnavailable),
        (500, "<html>", EngineUnavailable),
        (200, "<html>", EngineUnavailable),
        (200, '{"ids": "b1", "total": 1}', EngineUnavailable),
        (429, "", EngineThrottled),
        (401, "", EngineMisconfigured),
    ],
)
async def test_an_outage_is_nobodys_fault(
    engine: Any, library: Library, status: int, body: str, raised: type[EngineUnavailable]
) -> None:
    library.told = web.Response(status=status, text=body)
    assert isinstance(await scored(engine, "trial"), Unavailable)
    with pytest.raises(EngineUnavailable) as caught:
        await engine.check()
    assert type(caught.value) is raised


async def test_a_pause_that_is_asked_for_reaches_the_quota(engine: Any, library: Library, events: list[str]) -> None:
    library.told = web.Response(status=429, headers={"Retry-After": "7"})
    with pytest.raises(EngineThrottled) as caught:
        await engine.search(SearchRequest("trial", retmax=1))
    assert caught.value.retry_after_s == 7.0
    assert events == ["replied", "throttled"]
