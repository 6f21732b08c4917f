"""Starting a learner: what `deepretrieval learner` does on every rank."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Literal

import msgspec
import torch

from common import messages as m
from common.config import Config
from common.data.rows import requests_of
from common.run_folder import RunFolder
from common.tasks import Row, Task
from common.tasks.from_config import task_of
from common.tracking.tracker import Tracker
from common.transport.keys import load_run_keys
from learner.adapters import LoraSettings
from learner.checkpoint import CheckpointError, latest_valid, load_checkpoint
from learner.connection import LearnerConnection
from learner.distributed import failures_recorded, initialize, shutdown
from learner.loop import LearnerLoop, LearnerParts, LearnerState
from learner.prompt_lengths import log_too_long, prompt_tokens, too_long
from learner.prompts import PromptStream
from learner.rank_watch import RankWatch
from learner.settings import TrainerSettings
from learner.team import Team
from learner.trainer import Trainer
from learner.weight_server import WeightServer

logger = logging.getLogger(__name__)

Resume = Literal["no", "must", "auto"]


def run_learner(
    config: Config, folder: RunFolder, endpoint: str, host: str, resume: Resume, stop_requested: Callable[[], bool]
) -> bool:
    """Run one rank to its end; True where the run is complete, False where it was asked to stop.

    Args:
        endpoint: the broker's.
        host: address at which actors reach this rank's weight server.
        resume: whether to go on from the newest valid checkpoint in `folder`; `auto` begins anew where there is
            none.

    Raises:
        SupersededError: a newer learner leads this run.
        CheckpointError: nothing to resume from, or the disk refused.
        DataError, FileNotFoundError: corpus or model cannot be read.
    """
    torch.set_num_threads(config.learner.threads)
    try:
        with failures_recorded():
            return _run_rank(config, folder, endpoint, host, resume, stop_requested)
    finally:
        shutdown()


def _run_rank(
    config: Config, folder: RunFolder, endpoint: str, host: str, resume: Resume, stop_requested: Callable[[], bool]
) -> bool:
    learner = config.learner
    mesh = initialize(replicas=learner.replicas, collective_timeout=timedelta(seconds=learner.collective_timeout_s))
    assert config.model.path is not None, "the launcher resolves model.path"
    trainer = Trainer(trainer_settings(config), config.model.path, mesh)
    blob = _restore(trainer, folder, resume)
    with RankWatch(learner.collective_timeout_s) as watch:
        team = Team(trainer, folder.checkpoints, learner.keep_checkpoints, watch)
        if not trainer.leads:
            team.follow()
            return True
        state = None if blob is None else msgspec.msgpack.decode(blob, type=LearnerState)
        completed = _lead(config, folder, endpoint, host, team, state, stop_requested)
        team.dismiss()
        return completed


def trainer_settings(config: Config) -> TrainerSettings:
    """The trainer's settings from the sections learner, algorithm and sampling."""
    learner, algorithm = config.learner, config.algorithm
    return TrainerSettings(
        lr=learner.lr,
        betas=learner.betas,
        weight_decay=learner.weight_decay,
        grad_clip=learner.grad_clip,
        warmup_steps=learner.warmup_steps,
        lr_schedule=learner.lr_schedule,
        total_steps=learner.steps,
        max_response_tokens=config.sampling.max_tokens,
        minibatches=learner.minibatches,
        micro_batch_tokens=learner.micro_batch_tokens,
        temperature=config.sampling.temperature,
        compute_dtype=learner.dtype,
        lora=None if learner.lora is None else LoraSettings(**learner.lora.model_dump()),
        activation_checkpointing=learner.activation_checkpointing,
        compile=learner.compile,
        offload=learner.offload,
        seed=config.run.seed,
        **algorithm.model_dump(exclude={"filter_zero_variance"}) | {"kl_estimator": algorithm.chosen_kl_estimator},
    )


def _restore(trainer: Trainer, folder: RunFolder, resume: Resume) -> bytes | None:
    checkpoint = None if resume == "no" else latest_valid(folder.checkpoints)
    if checkpoint is None:
        if resume == "must":
            raise CheckpointError(
                f"nothing to resume: {folder.checkpoints} holds no valid checkpoint; start without --resume"
            )
        return None
    logger.info("resuming from %s", checkpoint)
    return load_checkpoint(trainer, checkpoint)


def _lead(
    config: Config,
    folder: RunFolder,
    endpoint: str,
    host: str,
    team: Team,
    resumed: LearnerState | None,
    stop_requested: Callable[[], bool],
) -> bool:
    """Rank 0: open the connections, run the loop, close them again."""
    task = task_of(config)
    train = requests_of(config.data, config.data.train_split)
    heldout = requests_of(config.data, config.data.heldout_split)[: config.data.heldout_limit]
    train_too_long = _too_long(config, task, train, config.data.train_split)
    heldout_too_long = _too_long(config, task, heldout, config.data.heldout_split)
    heldout = [row for row in heldout if row.id not in heldout_too_long]
    keys = load_run_keys(folder.keys, "learner")
    folder.heldout.mkdir(parents=True, exist_ok=True)
    tracker = Tracker(
        folder.path,
        name=config.run.name,
        config=config.model_dump(mode="json"),
        wandb_mode=config.tracking.wandb,
        project=config.tracking.project,
        entity=config.tracking.entity,
        resume_step=resumed.version if resumed else None,
        resume_dispositions=resumed.dispositions if resumed else 0,
    )
    weights = WeightServer(folder.weights, keys, host)
    incarnation = max(time.time_ns() // 1_000_000, resumed.incarnation + 1 if resumed else 0)  # clocks may go back
    connection = LearnerConnection(endpoint, keys, incarnation, max_frame_bytes=config.broker.max_frame_mib << 20)
    parts = LearnerParts(
        config=config,
        folder=folder,
        team=team,
        connection=connection,
        weights=weights,
        weights_key=keys.own.public.decode(),
        prompts=PromptStream(train, task, _train_sampling(config), config.run.seed, train_too_long),
        heldout=heldout,
        task=task,
        tracker=tracker,
        stop_requested=stop_requested,
        resumed=resumed,
    )
    try:
        return LearnerLoop(parts).run()
    finally:
        connection.close()
        weights.close()
        tracker.finish({})


def _too_long(config: Config, task: Task, rows: Sequence[Row], split: str) -> frozenset[str]:
    """Ids of the rows whose prompt leaves no room for an answer of `sampling.max_tokens`; the log says how many."""
    assert config.model.path is not None
    most = config.actor.max_model_len - config.sampling.max_tokens
    found = too_long(rows, prompt_tokens(config.model.path, task), most)
    log_too_long(found, rows, most, split)
    return found


def _train_sampling(config: Config) -> m.Sampling:
    sampling = config.sampling
    reproducible = sampling.reproducible
    if reproducible is None:
        # Seeded generation costs the engine a little; only the synchronous algorithm can repeat itself anyway.
        reproducible = config.learner.max_staleness == 0
    return m.Sampling(
        samples=sampling.group_size,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_tokens=sampling.max_tokens,
        seed=config.run.seed if reproducible else None,
    )
