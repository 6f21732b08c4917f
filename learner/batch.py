"""Packed micro-batches: what the model sees of a batch of samples.

A micro-batch is one row of tokens without any padding. Documents lie in it one behind the other; a document
is a prompt and one or more responses to it, so that the prompt is computed once for all of them. Positions
restart with every document, and those of every response continue from the prompt's end. Which token sees
which is in ``MicroBatch.layout``; ``learner.attention`` reads it. Losses read flat vectors of response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learner.attention import Document, PackedLayout
from learner.samples import TrainSample


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

    @property
    def document(self) -> Document:
        """The row's lengths, as attention needs them."""
        responses = tuple(len(sample.response_ids) - 1 for sample in self.samples)
        return Document(len(self.samples[0].prompt_ids), responses)


def build_rows(samples: Sequence[TrainSample], max_tokens: int, share_prompts: bool = True) -> list[Row]:
    """Gather samples of equal prompts into rows of at most ``max_tokens`` (a single sample may be longer)."""
    if not share_prompts:
        return [Row((sample,)) for sample in samples]
    by_prompt: dict[bytes, list[TrainSample]] = {}
    for sample in samples:
        by_prompt.setdefault(sample.prompt_ids.tobytes(), []).append(sample)
    rows: list[Row] = []
    for same_prompt in by_prompt.values():
        taken: list[TrainSample] = []
        for sample in same_prompt:
            if taken and Row((*taken, sample)).length > max_tokens:
                rows.append(Row(tuple(taken)))
                taken = []
            taken.append(sample)
        rows.append(Row(tuple(taken)))
    return rows


@dataclass(frozen=True)
class MicroBatch:
    """One packed row of S input tokens that predict N response tokens, whole responses only.

    Attributes:
        input_ids: int64 [1, S].
        position_ids: int64 [1, S].
        layout: which of the S tokens see each other.
        predictors: int64 [N], index into S of the hidden state that predicts each response token.
        targets: int64 [N], the response tokens.
        behaviour: float32 [N], their behaviour log-probabilities.
        versions: int64 [N], version of the policy that drew each of them.
        lengths: float32 [N], the length of their response.
        sequences: int64 [N], their response, counted from 0 in this micro-batch; non-decreasing.
        indices: int64 [responses], place of each response in the training step. A placeholder has one, 0.
        responses: number of responses; 0 marks a placeholder whose tokens weigh nothing.
        input_tokens: S; 0 for a placeholder.
    """

    input_ids: Tensor
    position_ids: Tensor
    layout: PackedLayout
    predictors: Tensor
    targets: Tensor
    behaviour: Tensor
    versions: Tensor
    lengths: Tensor
    sequences: Tensor
    indices: Tensor
    responses: int
    input_tokens: int

    @staticmethod
    def from_rows(rows: Sequence[Row]) -> MicroBatch:
        """Lay rows out; tensors are on the CPU."""
        layout = PackedLayout(tuple(row.document for row in rows))
        samples = [sample for row in rows for sample in row.samples]
        counts = np.array([len(sample.response_ids) for sample in samples])
        sequences = np.arange(len(samples)).repeat(counts)
        return MicroBatch(
            input_ids=_tensor([part for row in rows for part in _row_ids(row)], np.int64)[None],
            position_ids=_tensor([part for row in rows for part in _row_positions(row)], np.int64)[None],
            layout=layout,
            predictors=_tensor(_predictors(rows), np.int64),
            targets=_tensor([sample.response_ids for sample in samples], np.int64),
            behaviour=_tensor([sample.behaviour_logprobs for sample in samples], np.float32),
            versions=_tensor([sample.versions for sample in samples], np.int64),
            lengths=_tensor([counts.repeat(counts)], np.float32),
            sequences=_tensor([sequences], np.int64),
            indices=_tensor([np.array([sample.index for sample in samples])], np.int64),
            responses=len(samples),
            input_tokens=layout.tokens,
        )

    @staticmethod
    def placeholder() -> MicroBatch:
        """One prompt and one response token that count for nothing: keeps a rank in step with the others."""
        token = np.zeros(1, dtype=np.int32)
        row = Row((TrainSample(token, token, np.zeros(1, dtype=np.float32), token, 0.0, -1),))
        return replace(MicroBatch.from_rows([row]), responses=0, input_tokens=0)

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch on ``device``."""
        moved: dict[str, Any] = {k: v.to(device) for k, v in self.__dict__.items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    @property
    def tokens(self) -> int:
        """Response tokens that are trained on."""
        return len(self.targets) if self.responses else 0


def _tensor(parts: Sequence[NDArray[Any]], dtype: type[np.generic]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(dtype))


def _row_ids(row: Row) -> list[NDArray[Any]]:
    return [row.samples[0].prompt_ids, *(sample.response_ids[:-1] for sample in row.samples)]


def _row_positions(row: Row) -> list[NDArray[Any]]:
    prompt, responses = row.document.prompt, row.document.responses
    return [np.arange(prompt), *(np.arange(prompt, prompt + length) for length in responses)]


def _predictors(rows: Sequence[Row]) -> list[NDArray[Any]]:
    """Per response [T]: the prompt's last token predicts its first token, each of its own tokens the next one."""
    predictors = []
    cursor = 0
    for row in rows:
        cursor += row.document.prompt
        last = cursor - 1
        for length in row.document.responses:
            predictors.append(np.concatenate([[last], np.arange(cursor, cursor + length)]))
            cursor += length
    return predictors


def micro_batches(rows: Sequence[Row], max_tokens: int) -> list[MicroBatch]:
    """Rows packed into micro-batches of at most ``max_tokens`` (a longer row has one to itself).

    First-fit decreasing: the longest row first, each into the first micro-batch with room. It never takes
    more than 11/9 of the fewest possible micro-batches, plus 6/9 (Dosa, 2007), and depends on nothing but the
    rows' lengths and order.
    """
    bins: list[list[Row]] = []
    room: list[int] = []
    for row in sorted(rows, key=lambda row: -row.length):
        place = next((index for index, free in enumerate(room) if free >= row.length), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(max_tokens)
        bins[place].append(row)
        room[place] -= row.length
    return [MicroBatch.from_rows(taken) for taken in bins]
