"""The engine and the answerer that a configuration describes. Each kind is imported only where it is used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.config import Config
from common.tasks import Task

if TYPE_CHECKING:
    from rewarders.answerers.base import Answerer
    from rewarders.answerers.sql import SqlAnswerer
    from rewarders.cache.shared import FleetResults
    from rewarders.engines.base import SearchEngine
    from rewarders.engines.ctgov import CtGovSettings
    from rewarders.engines.permits import Permit
    from rewarders.engines.pubmed import PubMedSettings
    from rewarders.engines.retrieval import RetrievalSettings
    from rewarders.retry import Retrier


def engine_of(config: Config, permit: Permit | None = None) -> SearchEngine:
    """What a run searches, not yet started: the engine, or in its place a recording of one. Arguments as for
    `upstream_of`."""
    from deploy.search_cache import recording_engine, replay_engine

    match config.search.cache.mode:
        case "replay":
            return replay_engine(config)
        case "record":
            return recording_engine(config, upstream_of(config, permit))
        case _:
            return upstream_of(config, permit)


def upstream_of(config: Config, permit: Permit | None = None) -> SearchEngine:
    """The search engine of a run, not yet started.

    Args:
        permit: entered around every request upstream; None: no quota.
    """
    from rewarders.engines.permits import unlimited

    permit = permit or unlimited
    match config.search.engine:
        case "ctgov":
            from rewarders.engines.ctgov import CtGovEngine

            return CtGovEngine(ctgov_settings(config), permit=permit)
        case "pubmed":
            from rewarders.engines.pubmed import PubMedEngine

            return PubMedEngine(pubmed_settings(config), permit=permit)
        case "bm25" | "dense":
            from rewarders.engines.retrieval import RetrievalEngine

            return RetrievalEngine(retrieval_settings(config), permit=permit)
        case kind:
            raise NotImplementedError(f"engine {kind}")


def answerer_of(
    config: Config, task: Task, permit: Permit | None = None, fleet: FleetResults | None = None
) -> Answerer:
    """What a rewarder of this run tries answers with, not yet started. fleet: shares results with other rewarders.

    Raises:
        ValueError: the task and the engine do not fit.
    """
    if config.search.engine == "sqlite":
        return sql_answerer_of(config, task)
    permit = _in_order(config, permit)
    from deploy.search_cache import search_cache_of
    from rewarders.answerers.search import SearchAnswerer
    from rewarders.breaker import Breaker
    from rewarders.cache import SearchCache
    from rewarders.engines.guarded import GuardedEngine, guarded
    from rewarders.retry import Retrier, RetryPolicy

    breaker = Breaker(config.search.breaker.failures, config.search.breaker.pause_s)
    retrier: Retrier = Retrier(RetryPolicy(attempts=config.search.attempts))
    cache: SearchCache = search_cache_of(config, fleet)
    return SearchAnswerer(
        task,
        GuardedEngine(engine_of(config, guarded(permit, breaker) if permit else None), breaker),
        sort=config.search.sort,
        cache=cache,
        retrier=retrier,
    )


def sql_answerer_of(config: Config, task: Task) -> SqlAnswerer:
    """What runs SQL answers of this run, not yet started.

    Raises:
        ValueError: the task's answers are no SQL.
    """
    from common.tasks.text_to_sql import TextToSql
    from rewarders.answerers.sql import DATABASES_FOLDER, SqlAnswerer

    if not isinstance(task, TextToSql):
        raise ValueError(f"search.engine sqlite runs SQL, but the answers of the task {task.name} are none")
    sql = config.search.sql
    folder = Path(config.data.corpus) / DATABASES_FOLDER
    return SqlAnswerer(task, folder, processes=sql.processes, deadline_s=sql.deadline_s)


def slots_of(config: Config) -> int:
    """Slots of the quota of a run that has one: what one key may ask for, for each key."""
    assert config.search.quota is not None
    return config.search.quota.requests * (1 + len(config.search.more_api_keys_env))


def has_server(config: Config) -> bool:
    """Whether the engine answers over HTTP; SQLite runs inside every rewarder."""
    return config.search.engine != "sqlite"


def _in_order(config: Config, permit: Permit | None) -> Permit | None:
    """`permit`, entered in the order in which groups are to be finished."""
    from rewarders.search_order import SearchOrder

    quota = config.search.quota
    return permit if permit is None or quota is None else SearchOrder(permit, slots_of(config))


def pubmed_settings(config: Config) -> PubMedSettings:
    """The PubMed client's settings of a run."""
    from rewarders.engines.pubmed import PubMedSettings

    search = config.search
    return PubMedSettings(
        base_url=_url(config),
        tool=search.tool,
        email=search.email,
        api_key_env=search.api_key_env or None,
        api_key_file=search.api_key_file,
        more_api_keys_env=search.more_api_keys_env,
        timeout_s=search.timeout_s,
        max_connections=search.max_connections,
    )


def ctgov_settings(config: Config) -> CtGovSettings:
    """The ClinicalTrials.gov client's settings of a run."""
    from rewarders.engines.ctgov import CtGovSettings

    search = config.search
    own: dict[str, Any] = {} if search.max_connections is None else {"max_connections": search.max_connections}
    return CtGovSettings(base_url=_url(config), tool=search.tool, email=search.email, timeout_s=search.timeout_s, **own)


def retrieval_settings(config: Config) -> RetrievalSettings:
    """The settings of the client of a BM25 or dense server."""
    from rewarders.engines.retrieval import RetrievalSettings

    most = config.search.max_connections
    own: dict[str, Any] = {} if most is None else {"max_requests": most}
    return RetrievalSettings(base_url=_url(config), timeout_s=config.search.timeout_s, **own)


def _url(config: Config) -> str:
    assert config.search.url is not None, "the launcher resolves search.url"
    return config.search.url
