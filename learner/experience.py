"""What a step knows of its responses before it changes a weight: log-probabilities, values, advantages, returns.

The models look once at every micro-batch. What they say, a few numbers per response token, is then gathered on
all ranks in the order of the samples, so that every rank computes the advantages of the whole step in the same
order and to the same bit, however the samples were spread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learner.advantages import ADVANTAGES, StepRewards
from learner.batch import MicroBatch
from learner.distributed import gather_bytes
from learner.losses import KL_ESTIMATORS
from learner.samples import TrainSample
from learner.settings import TrainerSettings

# The per-token streams that models provide.
PROXIMAL, REFERENCE, VALUES = "proximal", "reference", "values"
# Scores a micro-batch without gradient: float32 [N] by the names above, only those that the step reads.
Scorer = Callable[[MicroBatch], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Streams:
    """Per-token streams of one micro-batch, float32 [N] on its device; None where the algorithm reads none.

    Attributes:
        advantages: of each token.
        proximal: log-probability under the policy at the start of the step.
        reference: log-probability under the reference model.
        values: the critic's value at the start of the step.
        returns: the critic's target.
    """

    advantages: Tensor
    proximal: Tensor | None
    reference: Tensor | None
    values: Tensor | None
    returns: Tensor | None


@dataclass(frozen=True)
class StepSamples:
    """All samples of the step in the order of their indices; the same on every rank.

    Attributes:
        lengths: int64 [n], tokens of each response; they sum to T.
        groups: int64 [n].
        rewards: float64 [n], the task's rewards.
        behaviour: float32 [T], behaviour log-probabilities.
        scores: float32 [T] by name, what the models said.
    """

    lengths: Tensor
    groups: Tensor
    rewards: Tensor
    behaviour: Tensor
    scores: dict[str, Tensor]

    @property
    def sequences(self) -> Tensor:
        """int64 [T], the sample of each token."""
        return torch.repeat_interleave(torch.arange(len(self.lengths)), self.lengths)


@dataclass(frozen=True)
class Experience:
    """The whole step's streams, [T] each, and the figures that describe them."""

    lengths: list[int]
    streams: dict[str, Tensor]
    figures: dict[str, float]

    def of(self, batch: MicroBatch) -> Streams:
        """The streams of one micro-batch, in the order of its tokens. A placeholder gets zeros."""
        if batch.responses == 0:
            picked = dict.fromkeys(self.streams, torch.zeros_like(batch.behaviour))
        else:
            tokens = torch.cat([self._spans[index] for index in batch.indices.tolist()])
            picked = {name: stream[tokens].to(batch.behaviour) for name, stream in self.streams.items()}
        return Streams(advantages=picked["advantages"], **{name: picked.get(name) for name in _OPTIONAL})

    @cached_property
    def _spans(self) -> tuple[Tensor, ...]:
        """Where in [T] the tokens of each sample are."""
        return torch.arange(sum(self.lengths)).split(self.lengths)


_OPTIONAL = (PROXIMAL, REFERENCE, VALUES, "returns")


def collect_experience(
    batches: Sequence[MicroBatch], samples: Sequence[TrainSample], score: Scorer, settings: TrainerSettings
) -> Experience:
    """Score, gather, shape the rewards, estimate advantages. All ranks call this together.

    Args:
        batches: this rank's micro-batches of the step, placeholders included, on the CPU.
        samples: this rank's samples, those that ``batches`` hold.
        score: looks at one micro-batch; the same number of calls on every rank.

    Raises:
        ValueError: a value or KL is not finite.
    """
    scored = [score(batch) for batch in batches]
    step = gather_step(batches, samples, scored)
    rewards, kl = shaped_rewards(step, settings)
    values = step.scores.get(VALUES)
    estimated = ADVANTAGES[settings.advantage](
        StepRewards(rewards, step.sequences, step.groups, None if values is None else values.double()),
        settings.advantage_settings(),
    )
    streams = {"advantages": estimated.advantages, **step.scores}
    figures = {"advantage_std": float(estimated.advantages.std(correction=0))}
    if kl is not None:
        figures["kl_in_reward"] = float(kl.mean())
    if estimated.returns is not None and values is not None:
        streams["returns"] = estimated.returns
        figures |= value_figures(values.double(), estimated.returns)
    return Experience(step.lengths.tolist(), streams, figures)


def shaped_rewards(step: StepSamples, settings: TrainerSettings) -> tuple[Tensor, Tensor | None]:
    """Reward of every token, float64 [T], and the KL per token taken off it (None where it is in the loss).

    The task's reward falls on the last token. The KL is that of the proximal policy, or of the behaviour
    policy where the step does not score the proximal one.
    """
    rewards = torch.zeros(int(step.lengths.sum()), dtype=torch.float64)
    rewards[step.lengths.cumsum(0) - 1] = step.rewards
    if settings.kl_in != "reward" or REFERENCE not in step.scores:
        return rewards, None
    policy = step.scores.get(PROXIMAL, step.behaviour).double()
    kl = KL_ESTIMATORS[settings.kl_estimator](policy, step.scores[REFERENCE].double())
    return rewards - settings.kl_coef * kl, kl


def value_figures(values: Tensor, returns: Tensor) -> dict[str, float]:
    """How well the critic knew the returns before the step, over all tokens.

    Explained variance is 1 - Var(R - V) / Var(R): 1 for a perfect critic, 0 for one that says the same
    everywhere or where all returns are equal.
    """
    spread = returns.var(correction=0)
    unexplained = (returns - values).var(correction=0)
    return {
        "returns_mean": float(returns.mean()),
        "values_mean": float(values.mean()),
        "explained_variance": float(1 - unexplained / spread) if spread > 0 else 0.0,
    }


class _Share(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """One rank's samples in the order of its micro-batches; arrays are raw little-endian bytes."""

    integers: bytes  # int64 [n, 3]: index, length, group
    rewards: bytes  # float64 [n]
    streams: dict[str, bytes]  # float32 [t] each; the behaviour's among them


def gather_step(
    batches: Sequence[MicroBatch], samples: Sequence[TrainSample], scored: Sequence[Mapping[str, Tensor]]
) -> StepSamples:
    """Every rank's samples and scores on every rank, ordered by sample index. All ranks call this together."""
    shares = [
        msgspec.msgpack.decode(payload, type=_Share) for payload in gather_bytes(_encode(batches, samples, scored))
    ]
    integers = np.concatenate([np.frombuffer(share.integers, "<i8") for share in shares]).reshape(-1, 3)
    rewards = np.concatenate([np.frombuffer(share.rewards, "<f8") for share in shares])
    by_index = np.argsort(integers[:, 0])
    # Stable, so that the tokens of a response keep their order.
    tokens = np.argsort(np.repeat(integers[:, 0], integers[:, 1]), kind="stable")
    streams = {
        name: torch.from_numpy(np.concatenate([np.frombuffer(share.streams[name], "<f4") for share in shares])[tokens])
        for name in sorted({name for share in shares for name in share.streams})
    }
    return StepSamples(
        lengths=torch.from_numpy(integers[by_index, 1]),
        groups=torch.from_numpy(integers[by_index, 2]),
        rewards=torch.from_numpy(rewards[by_index]),
        behaviour=streams.pop("behaviour"),
        scores=streams,
    )


def _encode(
    batches: Sequence[MicroBatch], samples: Sequence[TrainSample], scored: Sequence[Mapping[str, Tensor]]
) -> bytes:
    real = [(batch, scores) for batch, scores in zip(batches, scored, strict=True) if batch.responses]
    by_index = {sample.index: sample for sample in samples}
    ordered = [by_index[index] for batch, _ in real for index in batch.indices.tolist()]
    names = sorted({name for scores in scored for name in scores})
    streams = {name: _flat([scores[name] for _, scores in real]) for name in names}
    share = _Share(
        integers=np.array([(s.index, len(s.response_ids), s.group) for s in ordered], dtype="<i8").tobytes(),
        rewards=np.array([sample.reward for sample in ordered], dtype="<f8").tobytes(),
        streams={name: array.tobytes() for name, array in streams.items()}
        | {"behaviour": _flat([batch.behaviour for batch, _ in real]).tobytes()},
    )
    return msgspec.msgpack.encode(share)


def _flat(tensors: Sequence[Tensor]) -> NDArray[np.float32]:
    parts = [tensor.to("cpu", torch.float32).numpy() for tensor in tensors]
    return np.concatenate(parts) if parts else np.empty(0, np.float32)
