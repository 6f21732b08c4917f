"""What each role's process does between its start and its end, on any host."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from common.broker.server import BrokerServer
from common.broker.service import BrokerService, BrokerSettings
from common.config import Config
from common.messages import Role
from common.off_peak import WAITS_FOR, next_open
from common.quota import USE_GRANT_WITHIN_S
from common.run_folder import RunFolder
from common.tasks.from_config import task_of
from common.transport.client import BrokerClient
from common.transport.keys import RunKeys, load_run_keys
from deploy.engines import answerer_of, slots_of
from deploy.service_rules import check_service

if TYPE_CHECKING:
    from actors.engine import EngineOptions
    from actors.prompts import PromptEncoder

logger = logging.getLogger(__name__)

Resume = Literal["no", "must", "auto"]  # auto: from the newest valid checkpoint, or anew where there is none

QUOTA_SLACK_S = 6.0  # connecting and scheduling, beyond the deadline of the request itself
PARENT_CHECK_S = 0.5
SAME_SIGNAL_S = 1.0  # Ctrl-C reaches a rank twice: from the terminal, and passed on by the process that started it


def stop_on_signals() -> threading.Event:
    """An event that SIGTERM and SIGINT set; a second signal ends the process at once."""
    stop = threading.Event()
    first_at = 0.0

    def handle(number: int, _frame: object) -> None:
        nonlocal first_at
        if stop.is_set() and time.monotonic() - first_at > SAME_SIGNAL_S:
            os._exit(128 + number)
        if not stop.is_set():
            first_at = time.monotonic()
        stop.set()

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)
    return stop


def end_with_parent(parent: int, grace_s: float) -> None:
    """End this process when `parent` is gone, so that a killed launcher leaves no role behind.

    A thread looks at the parent's id: prctl(PR_SET_PDEATHSIG) is Linux only and bound to the parent's thread.

    Args:
        grace_s: time to save and say goodbye; 0 where somebody else may take this role's place at once.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_CHECK_S)
        if grace_s > 0:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(grace_s)
        if os.getpgrp() == os.getpid():
            os.killpg(os.getpid(), signal.SIGKILL)  # engine processes and ranks too
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def peer_name(role: str, given: str | None) -> str:
    """A name no other peer has: the one given, or role, host and process."""
    return given or f"{role}-{socket.gethostname()}-{os.getpid()}"


def run_broker(config: Config, keys: Path, port: int) -> None:
    """Serve as the run's broker until SIGTERM or SIGINT.

    Raises:
        OSError: the port cannot be bound. KeyFileError: no keys. LaunchError: as `check_service`.
    """
    check_service(config)
    stop = stop_on_signals()
    section, quota = config.broker, config.search.quota
    hard_deadline_s = config.search.timeout_s + USE_GRANT_WITHIN_S + QUOTA_SLACK_S
    settings = BrokerSettings(
        epoch=time.time_ns() // 1_000_000,
        lease_s=section.lease_s,
        heartbeat_s=section.heartbeat_s,
        queue_items=section.queue_items,
        queue_bytes=section.queue_mib << 20,
        quota_mode=quota.mode if quota else "strict",
        shared_bytes=config.search.cache.share_mib << 20,
        quota=(slots_of(config), quota.window_s, hard_deadline_s) if quota else None,
    )
    service = BrokerService(settings, time.monotonic())
    hours = off_peak_hours if quota and quota.off_peak else None
    server = BrokerServer(service, load_run_keys(keys, "broker"), section.max_frame_mib << 20, hours)
    endpoint = server.bind(section.host, port)
    logger.info("broker listens at %s", endpoint)
    server.run(stop.is_set)


def off_peak_hours() -> tuple[float, str]:
    """Seconds until NCBI's hours for large jobs begin (0: they have), and what to call the wait.

    Raises:
        TimeZoneMissingError: this machine cannot tell US Eastern time.
    """
    now = datetime.now(UTC)
    return (next_open(now) - now).total_seconds(), WAITS_FOR


def _why_paused() -> str:
    closed_s, why = off_peak_hours()
    return why if closed_s > 0 else ""


def run_rewarder(config: Config, keys: Path, endpoint: str, name: str | None) -> None:
    """Score groups until the run is finished or SIGTERM asks to drain.

    Raises:
        LaunchError: the config would send without a quota to a service that asks for one.
    """
    for warning in check_service(config):
        logger.warning(warning)
    asyncio.run(_rewarder(config, keys, endpoint, peer_name("rewarder", name)))


async def _rewarder(config: Config, keys: Path, endpoint: str, name: str) -> None:
    from rewarders.loop import Rewarder
    from rewarders.scoring import Scorer

    client = _client(config, endpoint, load_run_keys(keys, "rewarder"), "rewarder", name)
    await client.start()
    task = task_of(config)
    if config.search.quota and config.search.quota.off_peak:
        client.pause = _why_paused
    try:
        permit = client.quota_slot if config.search.quota else None
        async with answerer_of(config, task, permit, client.shared) as answerer:
            rewarder = Rewarder(client, Scorer(task, answerer), config.rewarder.concurrent_groups)
            _drain_on_signals(rewarder.drain)
            await rewarder.run()
    finally:
        await client.close()


def _client(config: Config, endpoint: str, keys: RunKeys, role: Role, name: str) -> BrokerClient:
    return BrokerClient(endpoint, keys, role, name, max_frame_bytes=config.broker.max_frame_mib << 20)


def run_actor(config: Config, keys: Path, endpoint: str, name: str | None) -> None:
    """Generate until the run is finished or SIGTERM asks to drain.

    Raises:
        EngineError: no engine, or one that cannot load the model. BrokerUnreachableError.
    """
    asyncio.run(_actor(config, keys, endpoint, peer_name("actor", name)))


def engine_options(config: Config) -> EngineOptions:
    """What the section actor says of the engine, which evaluation runs as an actor does."""
    from actors.engine import EngineOptions

    section = config.actor
    return EngineOptions(
        dtype=section.dtype,
        threads=section.threads,
        max_model_len=section.max_model_len,
        max_sequences=section.concurrent_groups * config.sampling.group_size,
        kv_cache_gib=section.kv_cache_gib,
        gpu_memory_share=section.gpu_memory_share,
    )


def prompt_encoder(config: Config, model: Path) -> PromptEncoder:
    """How an actor renders the chat of a ticket: the model's template, and the beginning of the answer where the run's
    task gives one (`task.options.prefill`).
    """
    from actors.prompts import chat_encoder

    return chat_encoder(model, task_of(config).response_prefix)


async def _actor(config: Config, keys: Path, endpoint: str, name: str) -> None:
    from actors.engine import create_engine
    from actors.loop import Actor, run_actor
    from actors.weight_receiver import WeightReceiver

    section = config.actor
    assert config.model.path is not None, "the launcher resolves model.path"
    model = Path(config.model.path)
    run_keys = load_run_keys(keys, "actor")
    engine = create_engine(section.engine, engine_options(config))
    client = _client(config, endpoint, run_keys, "actor", name)
    await client.start()
    client.set_status(f"starting {engine.name}")
    receiver = WeightReceiver(run_keys)
    try:
        await engine.prepare()
        await engine.start(model, version=0)
        client.set_status("loading the first weights", "the learner's first weights")
        actor = Actor(client, engine, receiver, prompt_encoder(config, model), section.concurrent_groups)
    except BaseException:
        await engine.close()
        await client.close()
        raise
    _drain_on_signals(actor.drain)
    await run_actor(actor, engine, receiver, client)


def run_learner_role(config: Config, folder: RunFolder, endpoint: str, host: str, resume: Resume) -> bool:
    """Run one rank of the learner; True where the run is complete."""
    from learner.main import run_learner

    stop = stop_on_signals()
    return run_learner(config, folder, endpoint, host, resume, stop.is_set)


def _drain_on_signals(drain: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, drain)
