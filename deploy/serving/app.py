"""The HTTP application: rewriting, searching, the page, health and figures; vLLM's endpoints behind it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from dataclasses import replace
from importlib import resources
from typing import Annotated, Any, Final, TypeVar

from fastapi import Body, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, generate_latest

from actors.engine import EngineError, TextListener
from common.tasks import Row
from deploy.rewriting.results import Found
from deploy.rewriting.rewriter import AsyncRewriter, NotPossible
from deploy.rewriting.task_rewriter import Wish
from deploy.serving.figures import ServerFigures
from deploy.serving.limits import App, LimitLoad, RequireKey
from deploy.serving.openai_routes import no_openai
from deploy.serving.streaming import RewriteStream, Work
from deploy.serving.wire import (
    NumberedRewrite,
    RewriteBody,
    RewriteReply,
    SearchBody,
    SearchReply,
    TaskDescription,
    TasksReply,
)
from rewarders.engines.base import EngineUnavailable

T = TypeVar("T")

_RETRY_AFTER_S: Final = 5
_ABOUT: Final = "Rewrites requests into queries and searches for them. docs/rewriting.md explains every endpoint."
_REFUSALS: Final[dict[int | str, dict[str, Any]]] = {
    400: {"description": "It makes no sense here: an unknown task, no engine, an unknown database."},
    401: {"description": "The server wants its key."},
    413: {"description": "The body is too large."},
    422: {"description": "The body is not what this endpoint takes."},
    429: {"description": "Too many requests are under way; Retry-After says when to come back."},
    503: {"description": "Model or engine could not be asked."},
}


def make_app(rewriter: AsyncRewriter, openai: App | None, *, key: str, max_bytes: int, max_waiting: int) -> App:
    """The application around a started rewriter.

    Args:
        openai: vLLM's routes below `/v1`; None where another engine runs. key: "" for none.
        max_bytes: of a body. max_waiting: requests that are answered at once.
    """
    figures = ServerFigures()
    api = FastAPI(title=f"DeepRetrieval: {rewriter.model.name}", description=_ABOUT)
    _add_endpoints(api, Endpoints(rewriter, figures, openai is not None))
    _add_refusals(api)
    api.mount("/", openai or no_openai)
    limited: App = LimitLoad(api, max_bytes, max_waiting)
    return RequireKey(limited, key) if key else limited


class Endpoints:
    """What the routes do."""

    def __init__(self, rewriter: AsyncRewriter, figures: ServerFigures, has_openai: bool) -> None:
        self._rewriter = rewriter
        self._figures = figures
        self._has_openai = has_openai
        self._page = resources.files("deploy.serving").joinpath("page.html").read_text(encoding="utf-8")

    async def page(self) -> HTMLResponse:
        """The page to try it."""
        return HTMLResponse(self._page)

    async def health(self) -> JSONResponse:
        """200 while the model can be asked."""
        problem = await self._rewriter.generator.problem()
        status = 200 if problem is None else 503
        return JSONResponse(
            {"status": "ok" if problem is None else problem, "model": self._rewriter.model.name}, status
        )

    async def metrics(self) -> Response:
        """Figures for Prometheus: ours, then those that vLLM and Python keep for the whole process."""
        text = generate_latest(self._figures.registry) + generate_latest(REGISTRY)
        return PlainTextResponse(text, media_type=CONTENT_TYPE_LATEST)

    async def tasks(self) -> TasksReply:
        """What the model can be asked for, the default first."""
        described = [self._described(name) for name in self._rewriter.task_names()]
        return TasksReply(model=self._rewriter.model.name, openai=self._has_openai, tasks=described)

    async def rewrite(self, body: Annotated[RewriteBody, Body()], request: Request) -> Response:
        """Rewrites of one or several requests; with `search` also what each query brings."""
        if body.stream:
            stream = RewriteStream()
            works = self._works(body, stream.listener if body.deltas else None)
            return StreamingResponse(self._lines(stream.lines(works)), media_type="application/x-ndjson")
        works = self._works(body)
        with self._figures.request("rewrite"):
            groups = await _unless_gone(request, asyncio.gather(*works))
        rewrites = [rewrite for group in groups for rewrite in group]
        reply = RewriteReply(model=self._rewriter.model.name, rewrites=rewrites)
        return Response(reply.model_dump_json(), media_type="application/json")

    async def search(self, body: Annotated[SearchBody, Body()], request: Request) -> Response:
        """What one or several queries bring."""
        task = body.task or self._rewriter.default_task
        rows = [self._rewriter.row(text, task, body.database, max_date=body.max_date) for text in body.texts]
        searches = [self._found(self._rewriter.search(row.text, row, task, body.top), task) for row in rows]
        with self._figures.request("search"):
            results = await _unless_gone(request, asyncio.gather(*searches))
        return Response(SearchReply(results=list(results)).model_dump_json(), media_type="application/json")

    def _works(self, body: RewriteBody, listener_of: Callable[[int], TextListener] | None = None) -> list[Work]:
        """One per request. Raises NotPossible before any of them is begun."""
        rewriter, task = self._rewriter, body.task or self._rewriter.default_task
        top = body.top if body.search else 0
        wish = replace(
            rewriter.default_wish,
            n=body.n,
            temperature=body.temperature,
            top_p=body.top_p,
            seed=body.seed,
            guided=body.guided,
            max_tokens=body.max_tokens or rewriter.default_wish.max_tokens,
        )
        rewriter.require(task, wish, top)
        rows = [rewriter.row(text, task, body.database, body.knowledge, body.max_date) for text in body.texts]
        return [
            self._rewrites(index, row, task, wish, top, None if listener_of is None else listener_of(index))
            for index, row in enumerate(rows)
        ]

    async def _rewrites(
        self, index: int, row: Row, task: str, wish: Wish, top: int, listener: TextListener | None
    ) -> list[NumberedRewrite]:
        rewrites = await self._rewriter.attempt(row, task, wish, top, listener)
        for rewrite in rewrites:
            self._figures.rewrites.labels(
                task, "invalid" if rewrite.invalid else "cut" if rewrite.cut else "whole"
            ).inc()
            self._figures.tokens.labels(task).inc(rewrite.tokens)
            if top and not rewrite.invalid:
                self._figures.searches.labels(task, _verdict(rewrite.found)).inc()
        return [NumberedRewrite(index=index, sample=sample, **dict(each)) for sample, each in enumerate(rewrites)]

    async def _lines(self, lines: AsyncGenerator[str, None]) -> AsyncIterator[str]:
        """The lines of a stream, the last one an error where it cannot go on. A client that goes ends the rest."""
        try:
            with self._figures.request("rewrite"):
                async with contextlib.aclosing(lines):
                    async for line in lines:
                        yield line
        except (EngineUnavailable, EngineError, NotPossible) as error:
            yield json.dumps({"error": str(error)}) + "\n"

    async def _found(self, search: Coroutine[Any, Any, Found], task: str) -> Found:
        found: Found | None = None
        try:
            found = await search
            return found
        finally:
            self._figures.searches.labels(task, _verdict(found)).inc()

    def _described(self, name: str) -> TaskDescription:
        task, config = self._rewriter.task(name), self._rewriter.configs.get(name)
        return TaskDescription(
            name=name,
            searchable=self._rewriter.can_search(name),
            engine=None if config is None else config.search.engine,
            needs_database="database" in task.needs,
            pattern=task.answer_pattern,
        )


def _add_endpoints(api: FastAPI, endpoints: Endpoints) -> None:
    api.get("/", include_in_schema=False)(endpoints.page)
    api.get("/health")(endpoints.health)
    api.get("/metrics", response_class=PlainTextResponse)(endpoints.metrics)
    api.get("/tasks", response_model=TasksReply)(endpoints.tasks)
    api.post("/rewrite", response_model=RewriteReply, responses=_REFUSALS)(endpoints.rewrite)
    api.post("/search", response_model=SearchReply, responses=_REFUSALS)(endpoints.search)


def _add_refusals(api: FastAPI) -> None:
    """Every refusal is `{"detail": "one line"}`."""

    async def malformed(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        lines = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
        return JSONResponse({"detail": "; ".join(lines)}, 422)

    async def not_possible(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 400)

    async def unavailable(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 503, {"Retry-After": str(_RETRY_AFTER_S)})

    api.add_exception_handler(RequestValidationError, malformed)
    api.add_exception_handler(NotPossible, not_possible)
    for kind in (EngineUnavailable, EngineError):
        api.add_exception_handler(kind, unavailable)


def _verdict(found: Found | None) -> str:
    return "unavailable" if found is None else "refused" if found.refused else "found"


async def _unless_gone(request: Request, work: asyncio.Future[T]) -> T:
    """The result of the work, which is given up as soon as the client is gone."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watch = asyncio.ensure_future(gone())
    both: set[asyncio.Future[Any]] = {work, watch}
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise EngineUnavailable("the client is gone")
        return work.result()
    finally:
        watch.cancel()
        work.cancel()
