"""What one evaluation is: model, task, rows, sampling and engine, and what tells it from another."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from common.config import Config
from common.data.beir import CORPUS_FILE
from common.data.originals.chat_markup import prompt_of, published_text
from common.data.rows import requests_of
from common.metrics.ranking import is_ranking_metric
from common.tasks import Message, Row, Task
from common.tasks.from_config import task_of
from deploy.errors import LaunchError
from deploy.models import ModelSource
from deploy.search_cache import REMOTE, without_user

PromptSource = Literal["task", "original"]

PREFILL: Final = "prefill"  # the task's option that begins the answer for the model

_CUTS: Final = (10, 100, 1000)
# Settings of an engine that change no result.
_SPEED_ONLY: Final = {"processes", "threads", "batch", "gpu"}
# Measured, but not better where they are higher.
_NO_QUALITY: Final = frozenset({"rank", "rows", "timeout"})


@dataclass(frozen=True)
class Prompt:
    """What a model is asked: a chat, or a whole prompt as text; and the beginning of the answer."""

    messages: list[Message] | str
    prefix: str = ""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: `samples` per request, greedily where `temperature` is 0."""

    samples: int
    temperature: float
    top_p: float
    max_tokens: int
    seed: int


@dataclass(frozen=True)
class Plan:
    """One evaluation.

    Attributes:
        config: `data.corpus` is a folder and `data.heldout_split` the split that is evaluated.
        task: of the config.
        rows: the requests that are evaluated, in the order of the data.
        data: fingerprint of all requests of the split, evaluated or not.
        model: None: the requests themselves are the queries.
        baselines: evaluate the fixed queries too.
        rankings: keep what the engine returned, for a run file.
    """

    config: Config
    task: Task
    rows: tuple[Row, ...]
    data: str
    model: ModelSource | None
    sampling: Sampling
    prompt: PromptSource
    baselines: bool
    rankings: bool

    @property
    def name(self) -> str:
        """Of the model."""
        return "raw request" if self.model is None else self.model.name

    def prompt_of(self, row: Row) -> Prompt:
        """What the model is asked for a row. The published prompt is text, as the released checkpoints were trained on:
        its markup is not always that of the model's chat template.

        Raises:
            LaunchError: the published prompt is wanted, and the row has none.
        """
        if self.prompt == "task":
            return Prompt(self.task.messages(row), self.task.response_prefix)
        try:
            published = prompt_of(row.metadata)
        except ValueError as error:
            raise LaunchError(f"row {row.id!r}: its published prompt is none: {error}") from None
        if published is None:
            raise LaunchError(
                f"row {row.id!r} has no published prompt: prepare the original's own rows, or leave out --prompt"
            )
        return Prompt(published_text(msgspec.structs.replace(published, prefix="")), published.prefix)

    def fingerprint(self) -> dict[str, str]:
        """Whatever changes the answers or their scores, part by part; two evaluations may go on from each other only
        where all parts are equal. The number of requests is no part: more may follow."""
        search = self.config.search
        corpus = Path(self.config.data.corpus) / CORPUS_FILE
        size = corpus.stat().st_size if corpus.is_file() else 0
        source = [search.engine, search.url or [self.config.data.corpus, size], search.sort, search.cache.mode]
        settings = {"bm25": search.bm25, "dense": search.dense}.get(search.engine)
        parts = {
            "model": "none" if self.model is None else self.model.fingerprint(),
            "task": [self.config.task.model_dump(), self.task.top_k],
            "data": self.data,
            "engine": [source, settings and settings.model_dump(), search.sql.deadline_s],
            "sampling": [] if self.model is None else [msgspec.to_builtins(self.sampling), self.prompt],
            "inference": [] if self.model is None else [self.config.actor.engine, self.config.actor.dtype],
        }
        return {part: _digest(value) for part, value in parts.items()}

    def description(self) -> dict[str, Any]:
        """What evaluation.json says of it beside the fingerprint, for people and for comparisons."""
        return {
            "comparable": self.comparable(),
            "model": self.name,
            "task": self.config.task.name,
            "dataset": Path(self.config.data.corpus).name,
            "split": self.config.data.heldout_split,
            "engine": self.config.search.engine,
            "metric": self.task.metric,
            "sampling": msgspec.to_builtins(self.sampling),
        }

    def comparable(self) -> dict[str, str]:
        """Whatever changes what a query is worth, part by part. How it was come by is no part: models may be asked by
        different prompts, and the same engine may be reached at different addresses, or from a recording."""
        search, task = self.config.search, self.config.task
        corpus = Path(self.config.data.corpus) / CORPUS_FILE
        remote = [without_user(search.url or ""), search.sort] if search.engine in REMOTE else []
        settings = {"bm25": search.bm25, "dense": search.dense}.get(search.engine)
        options = {name: value for name, value in task.options.items() if name != PREFILL}
        parts = {
            "task": [task.name, self.task.top_k, options],
            "data": self.data,
            "engine": [
                *(search.engine, search.cache.source or remote, corpus.stat().st_size if corpus.is_file() else 0),
                settings and settings.model_dump(exclude=_SPEED_ONLY),
                search.sql.deadline_s,
            ],
        }
        return {part: _digest(value) for part, value in parts.items()}


def with_standard_metrics(config: Config) -> Config:
    """The config with the metrics every evaluation of rankings reports, within what the task asks the engine for."""
    task = task_of(config)
    if "relevant" not in task.needs:
        return config
    cuts = [k for k in _CUTS if k <= task.top_k]
    names = ["mrr", "ndcg@10", "hits@1", *(f"hits@{k}" for k in cuts[:1]), *(f"recall@{k}" for k in cuts)]
    metrics = tuple(dict.fromkeys([*config.task.metrics, *(name for name in names if is_ranking_metric(name))]))
    return config.model_copy(update={"task": config.task.model_copy(update={"metrics": metrics})})


def quality_metrics(task: Task, more: Sequence[str]) -> list[str]:
    """The metrics of which a wrong answer has 0, the task's own first. more: of the config."""
    given = sorted(task.measures - _NO_QUALITY)
    return list(dict.fromkeys([task.metric, *given, *(name for name in more if name not in _NO_QUALITY)]))


def for_published_prompts(config: Config) -> Config:
    """The config whose task reads answers as the original does; the published prompt begins them, not the task's."""
    options = {name: value for name, value in config.task.options.items() if name != PREFILL}
    task = config.task.model_copy(update={"strict": False, "options": options})
    return config.model_copy(update={"task": task})


def read_rows(config: Config, task: Task, limit: int | None) -> tuple[tuple[Row, ...], dict[str, str], str]:
    """Rows, those that lack what the task is scored by, and fingerprint of the split `data.heldout_split`.

    Raises:
        DataError: the split cannot be read. LaunchError: none of its rows can be scored.
    """
    rows = requests_of(config.data, config.data.heldout_split)
    data = _digest(msgspec.to_builtins(rows))
    lacking: dict[str, str] = {}
    usable = []
    for row in rows[:limit]:
        try:
            task.check_row(row)
            usable.append(row)
        except ValueError as error:
            lacking[row.id] = str(error)
    if not usable:
        reason = next(iter(lacking.values()), "it is empty")
        raise LaunchError(f"no request of the split {config.data.heldout_split} can be evaluated: {reason}")
    return tuple(usable), lacking, data


def _digest(value: object) -> str:
    return hashlib.sha256(msgspec.json.encode(value, order="sorted")).hexdigest()[:16]
