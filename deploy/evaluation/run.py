"""An evaluation at work: every request that is not finished yet, through model, engine and scorer, to the disk."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass

import msgspec
from rich.console import Console

from common.tasks import Row
from deploy.engines import answerer_of
from deploy.evaluation.methods import FixedQueries, Judge, Method, ModelAnswers, RankingKeeper
from deploy.evaluation.plan import Plan
from deploy.evaluation.progress import EvaluationProgress
from deploy.evaluation.records import EvaluationFolder, QueryRecord, RecordFile
from deploy.generation import generator_of
from deploy.local_quota import local_permit
from deploy.search_engine import check_engine, query_form
from deploy.search_process import searchable
from rewarders.answerers.base import Answerer
from rewarders.answerers.search import SearchAnswerer
from rewarders.baselines import baseline_queries, known_frequencies, pico_query
from rewarders.engines.retrieval_wire import RM3_SORT
from rewarders.scoring import Scorer

logger = logging.getLogger(__name__)

RAW = "original"  # the baseline that is the request itself
RM3 = "rm3"  # the request itself, searched a second time with what the first ranking adds to it


@dataclass(frozen=True)
class Work:
    """The requests of one method, and those of them that are to be done.

    baseline: its name; None: the model. sort: the engine's name of an order; None: that of the config.
    """

    baseline: str | None
    file: RecordFile
    rows: Sequence[tuple[int, Row]]
    queries: Mapping[str, str]
    sort: str | None = None

    @property
    def todo(self) -> list[tuple[int, Row]]:
        """Number and row of each request without a record."""
        return [(number, row) for number, row in self.rows if row.id not in self.file.records]


async def evaluate(plan: Plan, folder: EvaluationFolder, console: Console) -> dict[str | None, list[QueryRecord]]:
    """Do what is left of an evaluation; the records of every method (None: the model) in the order of the rows.

    Raises:
        LaunchError, EngineUnavailable, FatalScoringError, EngineError, DataError: it cannot go on; what is finished
            stays.
    """
    async with AsyncExitStack() as stack:
        works = []
        for name, queries in (await asyncio.to_thread(_queries, plan)).items():
            file = stack.enter_context(closing(RecordFile(folder.records_of(name), plan.rankings)))
            if file.cut_bytes:
                cut = f"{folder.records_of(name)}: an unfinished line was cut off"
                console.print(cut, style="yellow", highlight=False, soft_wrap=True)
            rows = [(number, row) for number, row in enumerate(plan.rows) if name is None or row.id in queries]
            works.append(Work(name, file, rows, queries, RM3_SORT if name == RM3 else None))
        left = [work for work in works if work.todo]
        if left:
            await _do(plan, folder, left, console)
        return {work.baseline: [work.file.records[row.id] for _, row in work.rows] for work in works}


def _queries(plan: Plan) -> dict[str | None, dict[str, str]]:
    """The query of every request for each fixed method; none for a model."""
    texts = {row.id: row.text for row in plan.rows}
    methods: dict[str | None, dict[str, str]] = {None: texts if plan.model is None else {}}
    form = query_form(plan.config)
    if not plan.baselines or form is None:
        return methods
    frequencies = known_frequencies(plan.config.data.corpus)
    for row in plan.rows:
        queries = baseline_queries(row.text, frequencies, form)
        pico = pico_query(row.text) if form == "boolean" else None
        for name, query in (queries if pico is None else {**queries, "pico_or": pico}).items():
            if name != RAW or plan.model is not None:
                methods.setdefault(name, {})[row.id] = query
    if plan.config.search.engine == "bm25":
        methods[RM3] = texts
    return methods


async def _do(plan: Plan, folder: EvaluationFolder, works: Sequence[Work], console: Console) -> None:
    async with _answerer(plan, folder) as answerer, AsyncExitStack() as stack:
        for work in works:
            sorted_answerer = _in_order(answerer, work.sort)
            rankings = RankingKeeper(sorted_answerer) if plan.rankings else None
            judge = _judge(plan, rankings or sorted_answerer)
            method: Method = FixedQueries(work.queries, judge, rankings)
            if work.baseline is None and plan.model is not None:
                generator = generator_of(plan.model, plan.config)
                console.print(f"Texts of [bold]{plan.name}[/] by {generator.name}", highlight=False)
                await stack.enter_async_context(generator)
                method = ModelAnswers(plan, generator, judge, rankings)
            with EvaluationProgress(work.baseline or plan.name, len(work.rows), len(work.todo), console) as progress:
                await record_all(work, method, judge, progress)


def _in_order(answerer: Answerer, sort: str | None) -> Answerer:
    if sort is None:
        return answerer
    assert isinstance(answerer, SearchAnswerer)  # nothing else has an order
    return answerer.sorted_by(sort)


def _judge(plan: Plan, answerer: Answerer) -> Judge:
    config = plan.config
    counted = config.search.cache.mode != "replay"
    return Judge(Scorer(plan.task, answerer), config.rewarder.concurrent_groups, counted)


@asynccontextmanager
async def _answerer(plan: Plan, folder: EvaluationFolder) -> AsyncIterator[Answerer]:
    """The engine, started and asked once, behind cache, retries and quota."""
    async with searchable(plan.config, folder.path, folder.path / "search-server.log") as config:
        await check_engine(config)
        async with answerer_of(config, plan.task, local_permit(config)) as answerer:
            yield answerer


async def record_all(work: Work, method: Method, judge: Judge, progress: EvaluationProgress) -> None:
    """Every request at once: the generator and the judge let in as many as they can work on."""

    async def do(number: int, row: Row) -> None:
        record = await method.record(row, number)
        work.file.append(msgspec.structs.replace(record, calls=judge.take_calls()))
        progress.advance(record)

    try:
        async with asyncio.TaskGroup() as group:
            for number, row in work.todo:
                group.create_task(do(number, row))
    except ExceptionGroup as failures:  # the first is the cause; the command shows it in one line
        raise failures.exceptions[0] from None
