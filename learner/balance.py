"""What a sample costs to train on, and cuts of a batch into parts of about equal cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from learner.samples import TrainSample


@dataclass(frozen=True)
class CostModel:
    """Cost of a forward and backward pass, in tokens through the linear layers.

    A decoder layer of width H with the usual 4 H feed-forward does about 24 H^2 operations per token in its
    matrices, and 4 H per pair of a query and a key it sees (2 H for the score, 2 H for the weighted sum).

    Attributes:
        pair_cost: cost of one query-key pair, 4 H / 24 H^2 = 1 / (6 H); 0 counts tokens only.
        share_prompts: whether samples of one prompt that stay together pay for it once.
    """

    pair_cost: float = 0.0
    share_prompts: bool = True

    @classmethod
    def of_model(cls, config: Any, share_prompts: bool = True) -> CostModel:
        """The model of a Hugging Face configuration."""
        return cls(1.0 / (6.0 * config.hidden_size), share_prompts)

    def prompt(self, length: int) -> float:
        """Cost of a prompt of ``length`` tokens."""
        return length + self.pair_cost * length * (length + 1) / 2

    def response(self, prompt: int, length: int) -> float:
        """Cost of a response of ``length`` tokens behind a prompt of ``prompt`` tokens, without the prompt's own."""
        # The last token predicts nothing, so it is no input.
        inputs = length - 1
        return inputs + self.pair_cost * (inputs * prompt + inputs * (inputs + 1) / 2)


def partition(samples: Sequence[TrainSample], parts: int, cost: CostModel | None = None) -> list[list[TrainSample]]:
    """Cut ``samples`` into ``parts`` runs of about equal cost, order kept.

    A cut falls between two groups rather than inside one where that puts less out of balance than computing
    the prompt on both sides would cost. No part exceeds the fair share (what all samples cost uncut, over
    ``parts``) by more than 2.5 times the costliest single sample, prompt included. With at least as many
    samples as parts, no part is empty.

    Args:
        cost: how to weigh samples; None counts tokens.
    """
    cost = cost or CostModel()
    starts, prompts, responses = _costs(samples, cost)
    ends = np.concatenate([[0.0], np.cumsum(np.where(starts, prompts, 0.0) + responses)])
    cuts = [0, *(_cut(ends, starts, prompts, ends[-1] * part / parts) for part in range(1, parts)), len(samples)]
    cuts = _without_empty(cuts) if len(samples) >= parts else np.maximum.accumulate(cuts).tolist()
    return [list(samples[start:end]) for start, end in pairwise(cuts)]


def _costs(
    samples: Sequence[TrainSample], cost: CostModel
) -> tuple[NDArray[np.bool_], NDArray[np.float64], NDArray[np.float64]]:
    """Per sample [n]: whether it has to compute its prompt, what that costs, and what its response costs."""
    keys = [sample.prompt_ids.tobytes() for sample in samples]
    starts = [not cost.share_prompts or i == 0 or keys[i] != keys[i - 1] for i in range(len(keys))]
    prompts = [cost.prompt(len(sample.prompt_ids)) for sample in samples]
    responses = [cost.response(len(sample.prompt_ids), len(sample.response_ids)) for sample in samples]
    return np.array(starts, dtype=bool), np.array(prompts, dtype=np.float64), np.array(responses, dtype=np.float64)


def _cut(ends: NDArray[np.float64], starts: NDArray[np.bool_], prompts: NDArray[np.float64], target: float) -> int:
    """Number of samples before the cut: the nearest to ``target``, or a group's edge if that is near enough."""
    distances = np.abs(ends - target)
    nearest = int(distances.argmin())
    edges = np.concatenate([starts, [True]]).nonzero()[0]
    edge = int(edges[distances[edges].argmin()])
    split = nearest < len(prompts) and not starts[nearest]
    return edge if split and distances[edge] <= prompts[nearest] else nearest


def _without_empty(cuts: Sequence[int]) -> list[int]:
    """``cuts`` moved as little as it takes that every part has a sample."""
    places = np.arange(len(cuts))
    forward = np.maximum.accumulate(np.asarray(cuts) - places) + places
    latest = cuts[-1] - (len(cuts) - 1) + places
    return [int(cut) for cut in np.minimum(forward, latest)]


def shuffle_groups(samples: Sequence[TrainSample], seed: Sequence[int]) -> list[TrainSample]:
    """Samples ordered by a random permutation of their groups; the same for equal seeds."""
    members: dict[int, list[TrainSample]] = {}
    for sample in samples:
        members.setdefault(sample.group, []).append(sample)
    order = np.random.default_rng(list(seed)).permutation(sorted(members))
    return [sample for group in order.tolist() for sample in members[group]]
