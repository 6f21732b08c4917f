"""Every config that is shipped can be used, and those of the original's runs say what the original did."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from common.config import Config, load_config
from common.tasks import Row
from common.tasks.from_config import task_of
from deploy.run_checks import check_values
from deploy.service_rules import check_service

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
ORIGINALS = sorted((ROOT / "configs" / "original").glob("*.yaml"))
QWEN, LLAMA = "Qwen/Qwen2.5-3B-Instruct", "meta-llama/Llama-3.2-3B-Instruct"


class Run(NamedTuple):
    """What the original's scripts set beyond what they have in common.

    Attributes:
        start: the model, or the run gone on from.
        epochs, rows: of its training set; the steps follow from them.
        lengths: longest prompt and response in tokens.
        every: steps between checkpoints, and between tests.
        batch, mini: samples per step, and per optimizer update.
    """

    start: str
    epochs: int
    rows: int
    lengths: tuple[int, int]
    temperature: float
    every: tuple[int, int]
    batch: int = 64
    mini: int = 16


# The training scripts of github.com/pat-jj/DeepRetrieval. Rows: as far as they are known; pubmed, SQL and the sizes of
# DPR's and BEIR's training sets stand in where its own files are not public.
BEIR = ((256, 512), 0.6)
ORIGINAL = {
    "pubmed": Run(QWEN, 10, 12_600, (500, 500), 1.0, (100, 500)),
    "pubmed_32": Run(LLAMA, 10, 12_600, (500, 500), 1.0, (300, 500)),
    "pmd_no_reason": Run(QWEN, 15, 12_600, (500, 500), 1.0, (100, 500)),
    "ctgov": Run("original-pubmed", 5, 5_074, (500, 500), 1.0, (50, 200)),
    "ctgov_32": Run("original-pubmed_32", 10, 5_074, (500, 500), 1.0, (100, 500)),
    "nq": Run(QWEN, 5, 79_168, (256, 512), 1.0, (50, 50)),
    "nq_no_reason": Run(QWEN, 5, 79_168, (256, 512), 1.0, (50, 50)),
    "triviaqa": Run("original-nq", 5, 78_785, (256, 350), 0.6, (50, 50)),
    "squad": Run("original-nq", 5, 78_713, (256, 350), 1.0, (50, 50), 72, 18),
    "fever": Run(QWEN, 10, 109_810, *BEIR, (100, 20)),
    "hotpotqa": Run(QWEN, 10, 85_000, *BEIR, (100, 20)),
    # Its minibatch of 128 was more than its batch; what it must have been is the whole batch.
    "scifact": Run(QWEN, 100, 818, *BEIR, (50, 10), 64, 64),
    "nfcorpus": Run(QWEN, 10, 2_590, *BEIR, (20, 10)),
    "fiqa": Run(QWEN, 10, 14_166, *BEIR, (20, 10)),
    "msmarco_beir": Run(QWEN, 10, 502_939, *BEIR, (100, 20), 512, 128),
    "fever_dense": Run(QWEN, 10, 109_810, *BEIR, (200, 50)),
    "hotpotqa_dense": Run(QWEN, 10, 85_000, *BEIR, (200, 50)),
    "msmarco_beir_dense": Run(QWEN, 10, 502_939, *BEIR, (200, 50)),
    "nfcorpus_dense": Run(QWEN, 30, 2_590, *BEIR, (100, 10)),
    "scifact_dense": Run(QWEN, 50, 818, *BEIR, (100, 10), 64, 64),
    "msmarco_health": Run(QWEN, 5, 19_755, (256, 350), 1.0, (51, 50)),
    "msmarco_science": Run(QWEN, 5, 22_416, (256, 350), 1.0, (51, 50)),
    "msmarco_tech": Run(QWEN, 5, 10_974, (256, 350), 1.0, (51, 50)),
    "msmarco_health_dense": Run(QWEN, 5, 19_755, *BEIR, (20, 20)),
    "msmarco_science_dense": Run(QWEN, 5, 22_416, *BEIR, (20, 20)),
    "msmarco_tech_dense": Run(QWEN, 5, 10_974, *BEIR, (20, 20)),
    "bird": Run("Qwen/Qwen2.5-Coder-7B-Instruct", 5, 9_428, (2048, 512), 0.6, (200, 20)),
    "sql_all": Run("Qwen/Qwen2.5-Coder-3B-Instruct", 5, 18_087, (2048, 512), 0.6, (40, 40)),
    "spider": Run(QWEN, 5, 8_659, (2048, 512), 0.6, (200, 20)),
    "wikisql": Run(QWEN, 5, 56_355, (2048, 512), 0.6, (200, 20)),
}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT / "configs"))


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_it_passes_every_check_that_needs_no_data(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCBI_API_KEY", "0123456789")
    config = load_config(path, ["search.email=someone@example.org"])
    check_values(config)
    assert check_service(config) == []
    task = task_of(config)
    assert task.messages(Row("r", "which drugs help", tables="CREATE TABLE t (x)"))[-1]["content"]
    assert config.sampling.max_tokens < config.actor.max_model_len
    assert config.learner.groups_per_step * config.sampling.group_size >= config.learner.minibatches


def test_names_of_runs_are_distinct() -> None:
    names = [load_config(path).run.name for path in CONFIGS]
    assert len(set(names)) == len(names), "or one run would set the other aside"


def test_every_run_of_the_original_has_a_config() -> None:
    assert {path.stem for path in ORIGINALS} == set(ORIGINAL)


@pytest.mark.parametrize("path", ORIGINALS, ids=name_of)
def test_what_all_runs_of_the_original_share(path: Path) -> None:
    config = load_config(path)
    algorithm, learner, sampling = config.algorithm, config.learner, config.sampling
    assert (algorithm.advantage, algorithm.gamma, algorithm.gae_lambda) == ("gae", 1.0, 1.0)
    assert (algorithm.critic, algorithm.critic_lr, algorithm.value_clip) == ("separate", 1e-5, 0.5)
    assert (algorithm.clip_low, algorithm.clip_high, algorithm.dual_clip) == (0.2, 0.2, None)
    assert (algorithm.kl_in, algorithm.kl_estimator, algorithm.kl_coef) == ("reward", "k1", 0.001)
    assert (algorithm.entropy_coef, algorithm.denominator) == (0.001, "token_mean")
    assert not algorithm.filters_zero_variance, "a group of one has no variance"
    assert (learner.lr, learner.lr_schedule, learner.warmup_steps) == (1e-6, "constant", 0)
    assert (learner.betas, learner.weight_decay, learner.grad_clip) == ((0.9, 0.999), 0.01, 1.0)
    assert (sampling.group_size, sampling.top_p) == (1, 1.0)
    assert config.data.train_split == "train"
    assert config.data.heldout_split == "dev", "what stops or tunes a run is never the test set"


@pytest.mark.parametrize("path", ORIGINALS, ids=name_of)
def test_what_each_run_of_the_original_set(path: Path) -> None:
    config, original = load_config(path), ORIGINAL[path.stem]
    learner, sampling = config.learner, config.sampling
    assert learner.groups_per_step == original.batch
    assert learner.minibatches == original.batch // original.mini
    assert learner.steps == original.epochs * (original.rows // original.batch), "whole batches of an epoch"
    assert (sampling.max_tokens, sampling.temperature) == (original.lengths[1], original.temperature)
    assert config.actor.max_model_len >= sum(original.lengths)
    assert (learner.checkpoint_every, learner.eval_every) == original.every
    assert original.start in str(config.model.path)
    if original.start.startswith("original-"):
        assert_saved(ORIGINAL[original.start.removeprefix("original-")], config)


def assert_saved(earlier: Run, config: Config) -> None:
    """The run gone on from does save that step."""
    step = int(str(config.model.path).rpartition("step-")[2])
    assert step % earlier.every[0] == 0
