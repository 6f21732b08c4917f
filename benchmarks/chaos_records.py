"""What a run left behind, read back, and every trained sample of it scored again by the same code, without faults."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import msgspec

from benchmarks.chaos_audit import Line, Records, Rules
from common import messages as m
from common.config import Config
from common.data.beir import read_split
from common.run_folder import RunFolder
from common.scores import Unavailable
from common.tasks import Row
from common.tasks.from_config import task_of
from common.tracking.dispositions_log import read_dispositions
from common.tracking.samples_log import read_samples
from deploy.assets import cache_folder
from learner.checkpoint import BLOB, latest_valid
from learner.loop import LearnerState
from learner.prompts import PromptStream
from rewarders.answerers.search import SearchAnswerer
from rewarders.engines.pubmed import PubMedEngine, PubMedSettings
from rewarders.scoring import Scorer
from rewarders.servers.pubmed import ServerSettings, serve

PATIENCE_S = 120.0
SCORED_AT_ONCE = 32


class MissingRecordError(RuntimeError):
    """The run left too little to be audited; the message says what is missing."""


def read_records(folder: RunFolder) -> Records:
    """The final lineage: what a resume from the newest checkpoint would keep.

    Raises:
        MissingRecordError: no valid checkpoint, or a record is shorter than the checkpoint says.
        ValueError: a record has a broken line.
    """
    checkpoint = latest_valid(folder.checkpoints)
    if checkpoint is None:
        raise MissingRecordError(f"{folder.checkpoints} holds no valid checkpoint")
    state = msgspec.msgpack.decode((checkpoint / BLOB).read_bytes(), type=LearnerState)
    dispositions = read_dispositions(folder.dispositions)
    if len(dispositions) < state.dispositions:
        raise MissingRecordError(f"{len(dispositions)} dispositions, the checkpoint counts {state.dispositions}")
    samples = [line for line in read_samples(folder.samples) if line["step"] <= state.version]
    held = [int(m.decode(frames[0], m.Ticket).ticket_id) for frames in state.groups]
    return Records(state.version, state.ledger, held, dispositions[: state.dispositions], samples)


def prompt_stream(config: Config) -> PromptStream:
    """The stream the learner of this run takes its prompts from."""
    sampling = m.Sampling(config.sampling.group_size, config.sampling.temperature, config.sampling.top_p, 1)
    rows = read_split(Path(config.data.corpus), config.data.train_split)
    return PromptStream(rows, task_of(config), sampling, config.run.seed)


def rules_of(config: Config, prompts: PromptStream) -> Rules:
    """What the run promised."""
    return Rules(
        group_size=config.sampling.group_size,
        groups_per_step=config.learner.groups_per_step,
        max_staleness=config.learner.max_staleness,
        prompt_id_at=lambda position: prompts.row(position).id,
    )


async def true_rewards(config: Config, prompts: PromptStream, samples: Sequence[Line]) -> list[float]:
    """What each sample is worth: its text, judged for the request at its ticket's position.

    Raises:
        RuntimeError: a text could not be scored although nothing fails here.
    """
    corpus, search = Path(config.data.corpus), config.search
    async with (
        await serve(ServerSettings(corpus=corpus, cache_folder=cache_folder() / "indexes")) as server,
        PubMedEngine(PubMedSettings(base_url=server.base_url, api_key_env=None, timeout_s=PATIENCE_S)) as engine,
    ):
        task = task_of(config)
        scorer = Scorer(task, SearchAnswerer(task, engine, sort=search.sort))
        turns = asyncio.Semaphore(SCORED_AT_ONCE)

        async def reward(text: str, row: Row) -> float:
            async with turns:
                score = await scorer.score_text(text, row)
            if isinstance(score, Unavailable):
                raise RuntimeError(f"a sample could not be scored again: {score.reason}")
            return score.reward

        rows = (prompts.row(int(sample["ticket"])) for sample in samples)
        return await asyncio.gather(*(reward(sample["text"], row) for sample, row in zip(samples, rows, strict=True)))
