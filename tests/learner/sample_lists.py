"""Samples written by hand or drawn by Hypothesis, for tests of their layout, balance and wire form."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from learner.samples import TrainSample


def sample(prompt: list[int], response: list[int], group: int = 0, index: int = 0) -> TrainSample:
    """A sample whose tokens were drawn by policy versions 5, 6, ..."""
    return TrainSample(
        prompt_ids=np.array(prompt, dtype=np.int32),
        response_ids=np.array(response, dtype=np.int32),
        behaviour_logprobs=-np.arange(1, len(response) + 1, dtype=np.float32),
        versions=np.arange(5, 5 + len(response), dtype=np.int32),
        reward=0.5,
        group=group,
        index=index,
    )


@st.composite
def sample_lists(draw: st.DrawFn, longest: int = 8) -> list[TrainSample]:
    """Up to 6 groups of up to 4 samples; prompts and responses of up to ``longest`` tokens out of 50."""
    ids = st.lists(st.integers(0, 49), min_size=1, max_size=longest)
    samples: list[TrainSample] = []
    for group in range(draw(st.integers(1, 6))):
        prompt = draw(ids)
        for _ in range(draw(st.integers(1, 4))):
            samples.append(sample(prompt, draw(ids), group, index=len(samples)))
    return samples
