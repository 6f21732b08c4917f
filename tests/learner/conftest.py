"""What the learner's tests share: one rank, a tiny model, and batches of random samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

from learner.distributed import initialize, shutdown
from learner.samples import TrainSample
from tests.tiny_model import build_tiny_model

VOCAB = 512
SampleMaker = Callable[..., list[TrainSample]]


@pytest.fixture(scope="session")
def mesh() -> Iterator[DeviceMesh]:
    """A CPU mesh of one rank; single-threaded, so that sums are always taken in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield initialize("cpu")
    shutdown()
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("tiny"), seed=0, vocab=VOCAB)


def random_samples(seed: int = 0, groups: int = 3, size: int = 4) -> list[TrainSample]:
    """Groups of ``size`` responses of 1 to 9 tokens to prompts of 3 to 12 tokens, with random rewards."""
    rng = np.random.default_rng(seed)
    samples = []
    for group in range(groups):
        prompt = rng.integers(0, VOCAB, rng.integers(3, 13)).astype(np.int32)
        for _ in range(size):
            length = int(rng.integers(1, 10))
            samples.append(
                TrainSample(
                    prompt_ids=prompt,
                    response_ids=rng.integers(0, VOCAB, length).astype(np.int32),
                    behaviour_logprobs=-rng.uniform(4.0, 8.0, length).astype(np.float32),
                    versions=rng.integers(0, 3, length).astype(np.int32),
                    reward=float(rng.normal()),
                    group=group,
                )
            )
    return samples


@pytest.fixture
def make_samples() -> SampleMaker:
    return random_samples
