"""Training samples, their spread over ranks, and the micro-batches that the model sees.

A micro-batch is a rectangle of *rows*. A row is one prompt followed by one or more responses to it; every
response attends to the prompt and to itself only and its positions continue from the prompt's end, so the
prompt is computed once for the whole group. A row with a single response is the ordinary layout. All losses
read flat vectors of response tokens, so another layout (several prompts per row) only has to replace
``build_rows`` and ``MicroBatch.from_rows``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Segment ids inside a row: the prompt is 0, responses count from 1.
PROMPT_SEGMENT = 0
PADDING_SEGMENT = -1


@dataclass(slots=True)
class TrainSample:
    """One response to one prompt, with everything the learner needs to train on it.

    Attributes:
        prompt_ids: int32 [P], P >= 1.
        response_ids: int32 [T], T >= 1, the generated tokens including the end-of-sequence token.
        behaviour_logprobs: float32 [T], log-probability of each response token under the distribution it was
            drawn from, sampling temperature included.
        reward: scalar reward of the whole response.
        group: id shared by the samples of one ticket.
        oldest_version: the oldest policy version among the response's tokens.
        advantage: filled by the trainer from the rewards of the step.
    """

    prompt_ids: NDArray[np.int32]
    response_ids: NDArray[np.int32]
    behaviour_logprobs: NDArray[np.float32]
    reward: float
    group: int
    oldest_version: int
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
    scalars: bytes  # float64 [n, 2]: reward, advantage
    integers: bytes  # int64 [n, 2]: group, oldest_version


def _pack(arrays: Iterable[NDArray[np.generic]], dtype: str) -> bytes:
    parts = [np.ascontiguousarray(array, dtype=dtype).tobytes() for array in arrays]
    return b"".join(parts)


def encode_samples(samples: Sequence[TrainSample]) -> bytes:
    """Samples as one MessagePack message, for the other ranks; order is kept."""
    lengths = [(len(sample.prompt_ids), len(sample.response_ids)) for sample in samples]
    block = _SampleBlock(
        prompt_lengths=_pack([np.array([prompt for prompt, _ in lengths])], "<i4"),
        response_lengths=_pack([np.array([response for _, response in lengths])], "<i4"),
        prompt_ids=_pack((sample.prompt_ids for sample in samples), "<i4"),
        response_ids=_pack((sample.response_ids for sample in samples), "<i4"),
        behaviour_logprobs=_pack((sample.behaviour_logprobs for sample in samples), "<f4"),
        scalars=_pack((np.array([sample.reward, sample.index]) for sample in samples), "<f8"),
        integers=_pack((np.array([sample.group, sample.oldest_version]) for sample in samples), "<i8"),
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
        np.frombuffer(block.scalars, "<f8").reshape(-1, 2).tolist(),
        np.frombuffer(block.integers, "<i8").reshape(-1, 2).tolist(),
        strict=True,
    )
    return [
        TrainSample(prompt, response, logprobs, reward, group, version, int(index))
        for prompt, response, logprobs, (reward, index), (group, version) in columns
    ]


def partition(samples: Sequence[TrainSample], parts: int) -> list[list[TrainSample]]:
    """Cut ``samples`` into ``parts`` runs of about equal tokens, order kept (so groups stay together where possible).

    The loads differ by at most the tokens of one sample on either side of a cut. With fewer samples than
    parts, some parts are empty.
    """
    tokens = np.array([sample.tokens for sample in samples], dtype=np.int64)
    middles = np.cumsum(tokens) - tokens / 2
    owners = np.minimum(middles * parts // max(tokens.sum(), 1), parts - 1).astype(int).tolist()
    cut: list[list[TrainSample]] = [[] for _ in range(parts)]
    for sample, owner in zip(samples, owners, strict=True):
        cut[owner].append(sample)
    return cut


def shuffle_groups(samples: Sequence[TrainSample], seed: Sequence[int]) -> list[TrainSample]:
    """Samples ordered by a random permutation of their groups; the same for equal seeds."""
    members: dict[int, list[TrainSample]] = {}
    for sample in samples:
        members.setdefault(sample.group, []).append(sample)
    order = np.random.default_rng(list(seed)).permutation(sorted(members))
    return [sample for group in order.tolist() for sample in members[group]]


@dataclass(frozen=True)
class Row:
    """One prompt and the responses computed after it.

    The last token of a response predicts nothing, so it is no input: the row is P + sum(T - 1) tokens long.
    """

    samples: tuple[TrainSample, ...]

    @property
    def length(self) -> int:
        """Input tokens of the row."""
        return len(self.samples[0].prompt_ids) + sum(len(sample.response_ids) - 1 for sample in self.samples)


def build_rows(samples: Sequence[TrainSample], max_row_tokens: int, share_prompts: bool = True) -> list[Row]:
    """Gather samples of equal prompts into rows of at most ``max_row_tokens`` (a single sample may be longer)."""
    if not share_prompts:
        return [Row((sample,)) for sample in samples]
    by_prompt: dict[bytes, list[TrainSample]] = {}
    for sample in samples:
        by_prompt.setdefault(sample.prompt_ids.tobytes(), []).append(sample)
    rows: list[Row] = []
    for same_prompt in by_prompt.values():
        taken: list[TrainSample] = []
        for sample in same_prompt:
            if taken and Row((*taken, sample)).length > max_row_tokens:
                rows.append(Row(tuple(taken)))
                taken = []
            taken.append(sample)
        rows.append(Row(tuple(taken)))
    return rows


@dataclass(frozen=True)
class MicroBatch:
    """R rows padded on the right to S tokens, holding N response tokens.

    Attributes:
        input_ids: int64 [R, S].
        position_ids: int64 [R, S].
        segments: int64 [R, S], 0 for the prompt, 1.. for its responses, -1 for padding.
        shared: whether some row has several responses, so that a causal mask alone is not enough.
        predictors: int64 [N], index into the R x S hidden states of the one that predicts each token.
        targets: int64 [N], the response tokens.
        behaviour: float32 [N], their behaviour log-probabilities.
        advantages: float32 [N], the advantage of their sample.
        lengths: float32 [N], the length of their response.
        responses: number of responses; 0 marks a placeholder whose tokens weigh nothing.
        input_tokens: tokens of the rows without padding.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: Tensor
    shared: bool
    predictors: Tensor
    targets: Tensor
    behaviour: Tensor
    sequences: Tensor
    versions: Tensor
    indices: Tensor
    lengths: Tensor
    responses: int
    input_tokens: int

    @staticmethod
    def from_rows(rows: Sequence[Row]) -> MicroBatch:
        """Lay rows out; tensors are on the CPU."""
        width = max(row.length for row in rows)
        ids = np.zeros((len(rows), width), dtype=np.int64)
        positions = np.tile(np.arange(width, dtype=np.int64), (len(rows), 1))
        segments = np.full((len(rows), width), PADDING_SEGMENT, dtype=np.int64)
        predictors = [
            index * width + offsets
            for index, row in enumerate(rows)
            for offsets in _fill_row(row, ids[index], positions[index], segments[index])
        ]
        samples = [sample for row in rows for sample in row.samples]
        counts = np.array([len(sample.response_ids) for sample in samples])
        return MicroBatch(
            input_ids=torch.from_numpy(ids),
            position_ids=torch.from_numpy(positions),
            segments=torch.from_numpy(segments),
            shared=any(len(row.samples) > 1 for row in rows),
            predictors=torch.from_numpy(np.concatenate(predictors)),
            targets=torch.from_numpy(np.concatenate([sample.response_ids for sample in samples]).astype(np.int64)),
            behaviour=torch.from_numpy(np.concatenate([sample.behaviour_logprobs for sample in samples])),
            sequences=torch.from_numpy(np.arange(len(counts)).repeat(counts)),
            versions=torch.from_numpy(np.array([s.oldest_version for s in samples]).repeat(counts)),
            indices=torch.from_numpy(np.array([s.index for s in samples])),
            lengths=torch.from_numpy(counts.astype(np.float32).repeat(counts)),
            responses=len(samples),
            input_tokens=sum(row.length for row in rows),
        )

    @staticmethod
    def placeholder() -> MicroBatch:
        """One prompt and one response token that count for nothing: keeps a rank in step with the others."""
        token = np.zeros(1, dtype=np.int32)
        row = Row((TrainSample(token, token, np.zeros(1, dtype=np.float32), 0.0, -1, 0),))
        batch = MicroBatch.from_rows([row])
        return replace(batch, responses=0, input_tokens=0)

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch on ``device``."""
        moved: dict[str, Any] = {k: v.to(device) for k, v in self.__dict__.items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    @property
    def tokens(self) -> int:
        """Response tokens that are trained on."""
        return len(self.targets) if self.responses else 0

    def attention_mask(self) -> Tensor | None:
        """bool [R, 1, S, S], True where query i may see key j; None where the plain causal mask says the same.

        Right padding needs no mask of its own: no token comes after it. Padding sees itself, as a row of the
            mask
        without any True would make the softmax undefined.
        """
        if not self.shared:
            return None
        queries, keys = self.segments[:, :, None], self.segments[:, None, :]
        allowed = (keys == PROMPT_SEGMENT) | (keys == queries)
        return allowed.tril().unsqueeze(1)


def _fill_row(
    row: Row, ids: NDArray[np.int64], positions: NDArray[np.int64], segments: NDArray[np.int64]
) -> list[NDArray[np.int64]]:
    """Write one row in place; returns, per response, the offsets in the row whose hidden states predict its tokens."""
    prompt = row.samples[0].prompt_ids
    end = len(prompt)
    ids[:end], segments[:end] = prompt, PROMPT_SEGMENT
    predictors = []
    cursor = end
    for segment, sample in enumerate(row.samples, start=1):
        inputs = len(sample.response_ids) - 1
        span = slice(cursor, cursor + inputs)
        ids[span], segments[span] = sample.response_ids[:-1], segment
        positions[span] = np.arange(end, end + inputs)
        predictors.append(np.concatenate([[end - 1], np.arange(cursor, cursor + inputs)]))
        cursor += inputs
    return predictors


def micro_batches(rows: Sequence[Row], max_tokens: int) -> list[MicroBatch]:
    """Rows of similar length together, each rectangle (padding included) within ``max_tokens`` unless it is one row."""
    batches: list[MicroBatch] = []
    taken: list[Row] = []
    for row in sorted(rows, key=lambda row: -row.length):
        if taken and taken[0].length * (len(taken) + 1) > max_tokens:
            batches.append(MicroBatch.from_rows(taken))
            taken = []
        taken.append(row)
    if taken:
        batches.append(MicroBatch.from_rows(taken))
    return batches
