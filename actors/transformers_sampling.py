"""What hangs on ``model.generate``: rows, the sampler before each token, the bookkeeping after it."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor

from actors.engine import Completion, GenerationRequest, mix_seed
from common.messages import WeightSpan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from actors.guided_decoding import Guide


class IncrementalText:
    """The text of a growing response, decoded token by token, and the search for the stop string in it."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, prompt_ids: Sequence[int]) -> None:
        self.text = ""
        self._backend = tokenizer.backend_tokenizer
        # The prompt goes in first: some tokenizers write the first token of a text without its leading space.
        self._stream = DecodeStream(ids=list(prompt_ids), skip_special_tokens=True)

    def push(self, token_id: int, stop: str) -> bool:
        """Appends a token; True where it completed ``stop``, after which the text is cut."""
        searched = max(len(self.text) - len(stop) + 1, 0)
        try:
            piece = self._stream.step(self._backend, token_id)
        except Exception:  # tokenizers raises nothing narrower
            # Bytes that are no UTF-8 and no beginning of any have broken the stream; the text goes on without them.
            self._stream = DecodeStream(skip_special_tokens=True)
            piece = self._stream.step(self._backend, token_id)
        self.text += piece or ""
        found = self.text.find(stop, searched)
        if found < 0:
            return False
        self.text = self.text[: found + len(stop)]
        return True


@dataclass
class Row:
    """One sample while it is generated."""

    group: Group
    index: int
    stream_seed: int
    text: IncrementalText | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None
    spans: tuple[WeightSpan, ...] = ()

    def take(self, token_id: int, logprob: float, is_eos: bool) -> None:
        """Appends a token and decides whether it was the last one."""
        assert self.text is not None
        request = self.group.request
        self.token_ids.append(token_id)
        self.logprobs.append(logprob)
        if self.text.push(token_id, request.stop) or is_eos:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= request.max_tokens:
            self.finish_reason = "length"
        if request.listener is not None:
            request.listener(self.index, self.text.text)

    def completion(self) -> Completion:
        """The response; only once the row has ended."""
        assert self.text is not None
        assert self.finish_reason is not None
        return Completion(
            np.asarray(self.token_ids, dtype=np.int32),
            np.asarray(self.logprobs, dtype=np.float32),
            self.text.text,
            self.finish_reason,
            self.spans,
        )


@dataclass
class Group:
    """A request, its rows and the caller's future. grammar: what its pattern was compiled to."""

    request: GenerationRequest
    grammar: Any = None
    rows: list[Row] = field(default_factory=list)
    done: Future[list[Completion]] = field(default_factory=Future)

    @classmethod
    def of(cls, request: GenerationRequest, grammar: Any = None) -> Group:
        """The group of a request; without a seed it gets a random one."""
        seed = secrets.randbits(63) if request.seed is None else request.seed
        group = cls(request, grammar)
        group.rows = [Row(group, index, mix_seed(seed, index)) for index in range(request.n)]
        return group

    def finish_if_complete(self) -> None:
        """Hands the responses over as soon as the last row has ended, while the rest of the batch goes on."""
        if all(row.finish_reason is not None for row in self.rows):
            with suppress(InvalidStateError):  # cancelled meanwhile
                self.done.set_result([row.completion() for row in self.rows])


class Sampler:
    """Draws the next token of every row and leaves it as the only choice (a logits processor).

    The token is the inverse of the cumulative distribution at one uniform number per (seed, sample, position),
    which comes from a counter and not from a generator's state. So a response does not depend on which rows
    happened to share its batch, as it would with one generator per batch.
    """

    def __init__(self, rows: Sequence[Row], device: torch.device, guide: Guide | None = None) -> None:
        requests = [row.group.request for row in rows]
        self._rows = rows
        self._guide = guide
        self._temperature = torch.tensor([r.temperature for r in requests], device=device).unsqueeze(1)
        self._top_p = torch.tensor([r.top_p for r in requests], device=device).unsqueeze(1)
        self._greedy = (self._temperature == 0).squeeze(1)
        self._truncates = any(r.top_p < 1 and r.temperature > 0 for r in requests)
        self._position = itertools.count()
        self.logprobs: list[float] = []  # [B], of the tokens drawn last

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``scores``: logits [B, V]. Returns [B, V]: 0 at the drawn tokens, -inf elsewhere."""
        if self._guide is not None:
            scores = self._guide.restrict(scores)
        logprobs = processed_logprobs(scores, self._temperature, self._top_p if self._truncates else None)
        position = next(self._position)
        uniform = [mix_seed(row.stream_seed, position) / 2**63 for row in self._rows]
        cumulative = logprobs.double().exp().cumsum(dim=-1)
        # Scaled by the total, which rounding leaves next to 1, so that the number always falls inside.
        threshold = torch.tensor(uniform, dtype=torch.float64, device=scores.device).unsqueeze(1) * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, threshold, right=True).squeeze(1).clamp_(max=scores.shape[-1] - 1)
        tokens = torch.where(self._greedy, scores.argmax(dim=-1), drawn).unsqueeze(1)
        self.logprobs = logprobs.gather(1, tokens).squeeze(1).tolist()
        if self._guide is not None:
            self._guide.accept(tokens.squeeze(1).tolist())
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens, 0.0)


def processed_logprobs(logits: Tensor, temperature: Tensor, top_p: Tensor | None) -> Tensor:
    """Log-probabilities [B, V] (float32) of the distribution that is sampled from.

    Args:
        logits: [B, V], any float type.
        temperature: [B, 1]; 0 stands for greedy decoding and is read as 1, without top-p.
        top_p: [B, 1] nucleus mass, or None for no truncation. The nucleus is the smallest set of most likely
            tokens whose mass reaches top_p (Holtzman et al. 2020, section 3.1); the rest get -inf.
    """
    greedy = temperature == 0
    logits = logits.float() / torch.where(greedy, 1.0, temperature)
    if top_p is None:
        return logits.log_softmax(dim=-1)
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    mass_before = probabilities.cumsum(dim=-1) - probabilities
    outside = (mass_before >= top_p) & (top_p < 1) & ~greedy
    outside[:, 0] = False
    dropped = torch.zeros_like(outside).scatter_(1, order, outside)
    return logits.masked_fill(dropped, -torch.inf).log_softmax(dim=-1)


class Progress:
    """Takes in the drawn tokens, ends rows and keeps the version spans (a stopping criterion).

    Args:
        rows: the batch, in order.
        sampler: the sampler of the same call of ``generate``.
        eos_ids: tokens that end a sequence.
        between_tokens: called after each token; may change the weights. Returns the version that draws the next
            token, or None to break off.
        version: the version that draws the first token.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        sampler: Sampler,
        eos_ids: Sequence[int],
        between_tokens: Callable[[], int | None],
        version: int,
    ) -> None:
        self._rows = rows
        self._sampler = sampler
        self._eos_ids = frozenset(eos_ids)
        self._between_tokens = between_tokens
        self._starts = [(version, 0)]  # (version, first position it drew)
        self._length = 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """``input_ids``: [B, P + t]. Returns [B] bool: which rows have ended."""
        self._length += 1
        tokens = input_ids[:, -1].tolist()
        for row, token_id, logprob in zip(self._rows, tokens, self._sampler.logprobs, strict=True):
            if row.finish_reason is None:
                row.take(token_id, logprob, token_id in self._eos_ids)
                if row.finish_reason is not None:
                    row.spans = self._spans(len(row.token_ids))
                    row.group.finish_if_complete()
        version = self._between_tokens()
        if version is None:
            return torch.ones(len(self._rows), dtype=torch.bool, device=input_ids.device)
        if version != self._starts[-1][0]:
            self._starts.append((version, self._length))
        ended = [row.finish_reason is not None or row.group.done.cancelled() for row in self._rows]
        return torch.tensor(ended, device=input_ids.device)

    def _spans(self, length: int) -> tuple[WeightSpan, ...]:
        ends = [start for _, start in self._starts[1:]] + [length]
        return tuple(WeightSpan(version, start, end) for (version, start), end in zip(self._starts, ends, strict=True))
