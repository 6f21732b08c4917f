"""Training samples: what they hold, when they are refused, and how they travel to the other ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray


@dataclass(slots=True)
class TrainSample:
    """One response to one prompt, with everything the learner needs to train on it.

    Attributes:
        prompt_ids: int32 [P], P >= 1.
        response_ids: int32 [T], T >= 1, the generated tokens including the end-of-sequence token.
        behaviour_logprobs: float32 [T], log-probability of each response token under the distribution it was
            drawn from, sampling temperature included.
        versions: int32 [T], version of the policy that drew each token.
        reward: scalar reward of the whole response.
        group: id shared by the samples of one ticket.
        index: place of the sample in its training step, filled by the trainer.
    """

    prompt_ids: NDArray[np.int32]
    response_ids: NDArray[np.int32]
    behaviour_logprobs: NDArray[np.float32]
    versions: NDArray[np.int32]
    reward: float
    group: int
    index: int = 0

    @property
    def tokens(self) -> int:
        """Prompt plus response tokens."""
        return len(self.prompt_ids) + len(self.response_ids)


def check_sample(sample: TrainSample, vocab_size: int) -> None:
    """Reject a sample that cannot be trained on.

    Raises:
        ValueError: an empty or mis-shaped array, a token id outside the vocabulary, or an impossible
            log-probability.
    """
    name = f"sample of group {sample.group}"
    if len(sample.prompt_ids) == 0 or len(sample.response_ids) == 0:
        raise ValueError(f"{name}: prompt and response need at least one token each")
    if sample.behaviour_logprobs.shape != sample.response_ids.shape:
        raise ValueError(
            f"{name}: {len(sample.response_ids)} response tokens, "
            f"{len(sample.behaviour_logprobs)} behaviour log-probabilities"
        )
    if sample.versions.shape != sample.response_ids.shape:
        raise ValueError(f"{name}: {len(sample.response_ids)} response tokens, {len(sample.versions)} policy versions")
    for ids in (sample.prompt_ids, sample.response_ids):
        if ids.min() < 0 or ids.max() >= vocab_size:
            raise ValueError(f"{name}: token id outside the vocabulary of {vocab_size}; is this the actor's model?")
    # Rounding may leave a probability a little above 1.
    if not np.isfinite(sample.behaviour_logprobs).all() or sample.behaviour_logprobs.max() > 1e-3:
        raise ValueError(f"{name}: behaviour log-probabilities must be finite and at most 0")


class _SampleBlock(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """Columns of many samples; arrays are raw little-endian bytes."""

    prompt_lengths: bytes  # int32
    response_lengths: bytes  # int32
    prompt_ids: bytes  # int32, concatenated
    response_ids: bytes  # int32, concatenated
    behaviour_logprobs: bytes  # float32, concatenated
    versions: bytes  # int32, concatenated
    rewards: bytes  # float64 [n]
    integers: bytes  # int64 [n, 2]: group, index


def _pack(arrays: Iterable[NDArray[np.generic]], dtype: str) -> bytes:
    parts = [np.ascontiguousarray(array, dtype=dtype).tobytes() for array in arrays]
    return b"".join(parts)


def encode_samples(samples: Sequence[TrainSample]) -> bytes:
    """Samples as one MessagePack message, for the other ranks; order is kept."""
    block = _SampleBlock(
        prompt_lengths=_pack([np.array([len(sample.prompt_ids) for sample in samples])], "<i4"),
        response_lengths=_pack([np.array([len(sample.response_ids) for sample in samples])], "<i4"),
        prompt_ids=_pack((sample.prompt_ids for sample in samples), "<i4"),
        response_ids=_pack((sample.response_ids for sample in samples), "<i4"),
        behaviour_logprobs=_pack((sample.behaviour_logprobs for sample in samples), "<f4"),
        versions=_pack((sample.versions for sample in samples), "<i4"),
        rewards=_pack([np.array([sample.reward for sample in samples])], "<f8"),
        integers=_pack((np.array([sample.group, sample.index]) for sample in samples), "<i8"),
    )
    return msgspec.msgpack.encode(block)


def _split(values: NDArray[Any], lengths: NDArray[np.int32]) -> list[NDArray[Any]]:
    ends = np.cumsum(lengths).tolist()
    return [values[end - length : end] for end, length in zip(ends, lengths.tolist(), strict=True)]


def decode_samples(payload: bytes) -> list[TrainSample]:
    """Inverse of ``encode_samples``; the arrays are read-only views of the message."""
    block = msgspec.msgpack.decode(payload, type=_SampleBlock)
    prompt_lengths = np.frombuffer(block.prompt_lengths, "<i4")
    response_lengths = np.frombuffer(block.response_lengths, "<i4")
    columns = zip(
        _split(np.frombuffer(block.prompt_ids, "<i4"), prompt_lengths),
        _split(np.frombuffer(block.response_ids, "<i4"), response_lengths),
        _split(np.frombuffer(block.behaviour_logprobs, "<f4"), response_lengths),
        _split(np.frombuffer(block.versions, "<i4"), response_lengths),
        np.frombuffer(block.rewards, "<f8").tolist(),
        np.frombuffer(block.integers, "<i8").reshape(-1, 2).tolist(),
        strict=True,
    )
    return [
        TrainSample(prompt, response, logprobs, versions, reward, group, index)
        for prompt, response, logprobs, versions, reward, (group, index) in columns
    ]
