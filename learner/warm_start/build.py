"""The warm-started model of a corpus: built once, cached by what it was made from, as a Hugging Face folder."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig

from common.tasks import load_task
from learner.warm_start.families import AnswerForm, Family, content_files
from learner.warm_start.induction import write_induction_circuit
from learner.warm_start.pretrain import Budget, ModelShape, Progress, new_model, pretrain
from learner.warm_start.tokenizer import save_tokenizer

logger = logging.getLogger(__name__)

WARM_START_FORMAT = 2  # part of the cache key: change it whenever the same settings give another model
RECORD = "warm_start.json"  # in the model's folder: what it was made from, and how far that went
_THREADS = 2
_WIDE = 128  # narrower matrices gain nothing from a second thread, and on a busy machine wait for it


@dataclass(frozen=True)
class WarmStartSettings:
    """What the model is made from, besides the corpus.

    `task`: whose prompts and answers it learns. `answers`: what its queries look like. `minutes` is a safety net: with
    time enough, the same settings give the same model on any machine; where it cuts the training short, that is warned
    of, now and whenever the model is used, and recorded.
    """

    layers: int = 2
    width: int = 128
    heads: int = 4
    vocabulary: int = 4096
    minutes: float = 3.0
    steps: int | None = None
    seed: int = 0
    reasoning: bool = False
    task: str = "publication_search"
    answers: AnswerForm = "boolean"


def warm_start(corpus: Path, root: Path, settings: WarmStartSettings, progress: Progress | None = None) -> Path:
    """Build the model below `root`, or find it there; returns its folder.

    Args:
        corpus: folder of a run's data. Its texts and the requests of its training split are read, never its
            judgments.
        progress: called with (share done, what is going on).

    Raises:
        DataError: the corpus cannot be read.
        ValueError: the corpus is too small or the settings make no model.
    """
    folder = root / f"warm-start-{_key(corpus, settings)}"
    if (folder / "config.json").is_file():
        _warn_if_cut_short(folder)
        return folder
    report = progress or (lambda share, text: None)
    unfinished = root / f".{folder.name}.{os.getpid()}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        _build(corpus, unfinished, settings, report)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.replace(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    _warn_if_cut_short(folder)
    return folder


def _warn_if_cut_short(folder: Path) -> None:
    made = json.loads((folder / RECORD).read_text()) if (folder / RECORD).is_file() else {}
    if made.get("cut_short"):
        logger.warning(
            "the warm start of %s was cut short by its limit of %g minutes after %d steps (%.0f %% clean copies): "
            "the model depends on the speed of this machine; raise model.warm_start.minutes to get the same everywhere",
            folder.name,
            made["minutes"],
            made["steps_done"],
            100 * made["clean_copies"],
        )


def _build(corpus: Path, folder: Path, settings: WarmStartSettings, report: Progress) -> None:
    torch.set_num_threads(min(_THREADS, os.cpu_count() or 1) if settings.width >= _WIDE else 1)
    report(0.0, "reading the corpus")
    task = load_task(settings.task, prompt="short", reasoning=settings.reasoning)
    family = Family(corpus, settings.answers, task)
    report(0.01, "training the tokenizer")
    tokenizer = family.tokenizer(settings.vocabulary)
    report(0.03, "collecting examples")
    sampler = family.sampler(tokenizer, settings.reasoning)
    shape = ModelShape(settings.layers, settings.width, settings.heads, 3 * settings.width)
    model = new_model(tokenizer, shape, settings.seed)
    write_induction_circuit(model, tokenizer, settings.seed, family.beginnings)
    budget = (
        Budget(seconds=60 * settings.minutes)
        if settings.steps is None
        else Budget(settings.steps, 60 * settings.minutes)
    )
    outcome = pretrain(
        model,
        tokenizer,
        sampler,
        seed=settings.seed,
        budget=budget,
        progress=lambda share, text: report(0.05 + 0.95 * share, text),
    )
    if outcome.cut_short:
        report(1.0, f"cut short by the limit of {settings.minutes:g} minutes after step {outcome.steps}")
    logger.info("warm start done: %.0f %% of sampled answers are clean copies", 100 * outcome.clean_copies)
    save_tokenizer(tokenizer, folder)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True
    )
    model.save_pretrained(folder)
    record = {"clean_copies": outcome.clean_copies, "steps_done": outcome.steps, "cut_short": outcome.cut_short}
    (folder / RECORD).write_text(json.dumps(asdict(settings) | record, indent=1))


def _key(corpus: Path, settings: WarmStartSettings) -> str:
    digest = hashlib.sha256(f"{WARM_START_FORMAT} {json.dumps(asdict(settings), sort_keys=True)}".encode())
    for path in content_files(corpus):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
